"""Text files: what they hold, and how it is read a piece at a time."""

import io
import json
import lzma
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any, TextIO

import pyarrow

from .errors import UserError


FORMATS = (".txt", ".jsonl")
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
# what reading a file can raise: it is not there, a broken archive, not UTF-8, no JSON
READ_ERRORS = (OSError, EOFError, ValueError, lzma.LZMAError)
SPACE = re.compile(r"[ \t\r\n]*")
CHUNK = 1 << 16  # characters of a JSON array that are read at once
LONGEST = 1 << 28  # bytes of a line, characters of a value: whole books are a hundredth of that
MOST_DIGITS = 4000  # of an integer; Python converts a few more, and refuses longer ones


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) < MOST_DIGITS else float(digits)


DECODER = json.JSONDecoder(parse_int=_integer)


def open_bytes(file: Path) -> IO[bytes]:
    """What is in a file, decompressed while it is read where the name ends in .gz, .zst, .bz2 or .xz."""
    if file.suffix == ".xz":  # which pyarrow does not know
        return lzma.open(file)
    return io.BufferedReader(pyarrow.input_stream(str(file), compression="detect"))


def open_text(file: Path) -> TextIO:
    """The same as UTF-8 text."""
    return io.TextIOWrapper(open_bytes(file), "utf-8")


def text_format(file: Path, formats: Collection[str] = FORMATS, compressions: Collection[str] = COMPRESSIONS) -> str:
    """
    What a file holds, as the end of its name says, which one of a compression may follow.

    Raises:
        UserError: there is no such file, or what it holds is none of the `formats`.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    ending = next((suffix for suffix in reversed(file.suffixes) if suffix not in compressions), None)
    if ending is None or ending not in formats:
        raise UserError(
            f"{file}: cannot tell what it holds from its name; it should end in {' or '.join(formats)}, "
            f"or in one of them and one of {', '.join(compressions)}"
        )
    return ending


def json_records(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """
    The objects in a file, each with the number of the line that it begins in; one is in memory at a time. In .jsonl
    each line holds one. In .json they follow each other in any layout, or are the elements of one array; an array of
    strings is read as if each were the field "text" of an object.

    Raises:
        ValueError: a line is not UTF-8, no JSON, no object or longer than `LONGEST`; the message names it.
        OSError, EOFError, lzma.LZMAError: the file or the archive is broken.
    """
    is_lines = text_format(file, (".json", ".jsonl")) == ".jsonl"
    with open_bytes(file) as stream:
        for line, value in _values_in_lines(stream) if is_lines else _values(stream):
            value = {"text": value} if isinstance(value, str) and not is_lines else value
            if not isinstance(value, dict):
                raise ValueError(f"line {line}: holds no JSON object")
            yield line, value


def _values_in_lines(stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(iter(lambda: stream.readline(LONGEST + 1), b""), start=1):
        if len(line) > LONGEST:
            raise ValueError(f"line {number}: has more than {LONGEST:,} bytes; make several rows of it")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            value = DECODER.decode(text) if text.strip() else None
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}: {error.msg}, column {error.colno}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number}: {error}") from error
        if text.strip():
            yield number, value


def _values(stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
    """JSON values one after the other, or the elements of one array."""
    characters = io.TextIOWrapper(stream, "utf-8-sig", newline="")
    decode = DECODER.raw_decode
    text, start, line = "", 0, 1  # what is read, how far it is decoded, and the line there
    in_array, after_value, ended = None, False, False

    def more(length: int) -> str:
        try:
            return characters.read(length)
        except UnicodeDecodeError as error:
            raise ValueError(f"line {line} or a later one: {error}") from error

    while True:
        begin = SPACE.match(text, start).end()  # ty: ignore[missing-union-attribute]: it matches everywhere
        line += text.count("\n", start, begin)
        start = begin
        if start == len(text):
            text, start = more(CHUNK), 0
            if text:
                continue
            if in_array and not ended:
                raise ValueError(f"line {line}: the array does not end")
            return
        first = text[start]
        if ended:
            raise ValueError(f"line {line}: something follows the array")
        if in_array and after_value and first not in ",]":
            raise ValueError(f"line {line}: no comma between two elements of the array")
        if in_array is None:
            in_array = first == "["
            start += in_array
        elif in_array and first in ",]":
            ended, after_value = first == "]", False
            start += 1
        else:
            try:
                value, end = decode(text, start)
            except json.JSONDecodeError as error:
                # a value that the chunk cuts off is in error at the end, or in a string that does not end
                cut_off = error.pos > len(text) - 16 or error.msg.startswith("Unterminated")
                if cut_off and len(text) - start > LONGEST:
                    too_long = f"line {line}: has more than {LONGEST:,} characters; make several rows of it"
                    raise ValueError(too_long) from error
                if not cut_off or not (rest := more(max(CHUNK, len(text) - start))):
                    line += text.count("\n", start, error.pos)
                    raise ValueError(f"line {line}: {error.msg}") from error
                text, start = text[start:] + rest, 0
                continue
            except RecursionError as error:
                raise ValueError(f"line {line}: {error}") from error
            yield line, value
            line += text.count("\n", start, end)
            start, after_value = end, True
