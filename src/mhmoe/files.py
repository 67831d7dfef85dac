"""Files that appear whole or not at all, and folders that are checked before long work."""

import json
import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError


@contextmanager
def replacing(file: Path) -> Generator[Path]:
    """
    Yield a path beside `file` to write to. What is there takes the place of `file` at once when the block ends well,
    and is removed when it fails.
    """
    unfinished = file.with_name(f".{file.name}.tmp")
    try:
        yield unfinished
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write a UTF-8 text as `file`, at once."""
    with replacing(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(file: Path, value: Any) -> None:
    """Write `value` as JSON with an indent of 2, at once."""
    write_text(file, json.dumps(value, indent=2) + "\n")


def check_writable(name: str, folder: Path) -> None:
    """
    Raises:
        UserError: `folder`, which was given as `name`, cannot be made or cannot be written to.
    """
    try:
        folder.absolute().lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # a name that no folder can have
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{name}: {reason}; give another name") from error
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
    try:
        with tempfile.TemporaryFile(dir=existing):  # what permissions say is not always true
            pass
    except OSError as error:
        raise UserError(f"{name}: {existing} is not a folder that can be written to") from error
