"""Text files."""

import io
from collections.abc import Collection
from pathlib import Path
from typing import TextIO

import pyarrow

from .errors import UserError


FORMATS = (".txt", ".jsonl")
COMPRESSIONS = (".gz", ".zst", ".bz2")


def open_text(file: Path) -> TextIO:
    """A UTF-8 text, decompressed while it is read where the name ends in .gz, .zst or .bz2."""
    return io.TextIOWrapper(pyarrow.input_stream(str(file), compression="detect"), "utf-8")


def text_format(file: Path, formats: Collection[str] = FORMATS, compressions: Collection[str] = COMPRESSIONS) -> str:
    """
    What a file holds, as the end of its name says, which one of a compression may follow.

    Raises:
        UserError: there is no such file, or what it holds is none of the `formats`.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    ending = next((suffix for suffix in reversed(file.suffixes) if suffix not in compressions), None)
    if ending not in formats:
        raise UserError(
            f"{file}: cannot tell what it holds from its name; it should end in {' or '.join(formats)}, "
            f"or in one of them and one of {', '.join(compressions)}"
        )
    return ending
