"""Text files."""

import io
from pathlib import Path
from typing import TextIO

import pyarrow


def open_text(file: Path) -> TextIO:
    """A UTF-8 text, decompressed while it is read where the name ends in .gz, .zst or .bz2."""
    return io.TextIOWrapper(pyarrow.input_stream(str(file), compression="detect"), "utf-8")
