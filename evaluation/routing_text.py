"""A text of any length as rows of tokens, for statistics: a piece of it in memory, every token in one row."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from transformers import PreTrainedTokenizerBase

from mhmoe.errors import UserError, one_line
from mhmoe.text import READ_ERRORS, json_records, open_text, text_format


PIECE = 1 << 16  # characters that are tokenised at once


def token_rows(
    file: Path, tokenizer: PreTrainedTokenizerBase, block_size: int, max_tokens: int
) -> Iterator[list[int]]:
    """
    The tokens of a text, each once and in its order. A row holds `block_size` tokens of one document, the last row of
    a document what is left of it. What the tokenizer puts before a text by itself stands before each document.

    Args:
        file: .txt, which is one document, or .jsonl with a document in the field "text" of each line; compressed
            where the name ends in .gz, .zst, .bz2 or .xz. Documents are tokenised some pages at a time, cut between
            words.
        max_tokens: where to stop.

    Raises:
        UserError: the file is broken or holds no text.
    """
    remaining = max_tokens
    try:
        for document in _documents(file):
            for row in _rows(document, tokenizer, block_size):
                yield row[:remaining]
                remaining -= len(row)
                if remaining <= 0:
                    return
    except UserError:
        raise
    except READ_ERRORS as error:
        raise UserError(f"{file}: cannot be read as {text_format(file)} ({one_line(error)})") from error
    if remaining == max_tokens:
        raise UserError(f"{file}: there is no text in it")


def _documents(file: Path) -> Iterator[TextIO]:
    if text_format(file) == ".txt":
        with open_text(file) as stream:
            yield stream
        return
    for line, record in json_records(file):
        text = record.get("text")
        if not isinstance(text, str):
            raise UserError(f'{file}: line {line} has no field "text" that holds a text')
        yield io.StringIO(text)


def _rows(document: TextIO, tokenizer: PreTrainedTokenizerBase, block_size: int) -> Iterator[list[int]]:
    pending: list[int] = []
    for number, piece in enumerate(_pieces(document)):
        # verbose=False: that a document is longer than the model's context is no matter here
        pending += tokenizer(piece, add_special_tokens=number == 0, verbose=False).input_ids
        whole = len(pending) // block_size * block_size
        yield from (pending[start : start + block_size] for start in range(0, whole, block_size))
        pending = pending[whole:]
    if pending:
        yield pending


def _pieces(document: TextIO) -> Iterator[str]:
    rest = ""
    while more := document.read(PIECE):
        text = rest + more
        # after a line, or before the space that most tokenizers take for a part of the next word
        end = max(text.rfind("\n") + 1, text.rfind(" "))
        end = end if end > 0 else len(text)
        yield text[:end]
        rest = text[end:]
    if rest:
        yield rest
