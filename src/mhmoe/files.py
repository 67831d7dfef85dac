"""Files that appear whole or not at all, and folders that are checked before long work."""

import errno
import json
import os
import re
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError, WriteError


# what the machine refuses, which is nobody's mistake in the program: room to write, and other things
FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk's quota is used up",
    errno.EFBIG: "a file may not be so large here",
}
REFUSALS = FULL | {
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "not permitted",
    errno.EMFILE: "too many open files",
    errno.ENAMETOOLONG: "the name is too long",
}
# how the writers of safetensors, tokenizers and torch say it, the last without the reason
OS_ERROR = re.compile(r"\(os error (\d+)\)")
FAILED_WRITE = re.compile(r"inline_container\.cc|iostream error|PytorchStreamWriter")


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
    except OSError as error:
        if error.errno is not None:
            error.filename = error.filename or str(file)  # which a failed write does not say
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write a UTF-8 text as `file`, at once."""
    with replacing(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8", newline="")  # line ends as they are


def write_json(file: Path, value: Any) -> None:
    """Write `value` as JSON with an indent of 2, at once."""
    write_text(file, json.dumps(value, indent=2) + "\n")


@contextmanager
def writing(folder: Path, way_out: str | Callable[[], str]) -> Generator[None]:
    """
    What the block writes, it writes into `folder`.

    Raises:
        WriteError: the machine refused to write a file; `way_out` says how to go on.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (refusal := refusal_of(error, folder)) is None:
            raise
        raise WriteError(refusal, way_out if isinstance(way_out, str) else way_out()) from error


def refusal_of(error: BaseException, folder: Path) -> str | None:
    """
    The file and the reason, where `error`, or what it came of, is that the machine refused to write into `folder`.
    Libraries tell neither of them always: the file then is the one that was written to last.
    """
    cause, named = error, None
    while cause is not None:
        number = _error_number(cause)
        if isinstance(cause, OSError):
            named = cause.filename2 or cause.filename or named
        inside = named is not None and Path(os.fsdecode(named)).absolute().is_relative_to(folder.absolute())
        if number in FULL or (number in REFUSALS and inside):
            file = os.fsdecode(named) if inside else _last(folder)
            return f"{file}: cannot be written, {REFUSALS[number]} ({os.strerror(number)})"
        if number is None and FAILED_WRITE.search(str(cause)):
            return f"{_last(folder)}: cannot be written, as if the disk is full"
        cause = cause.__cause__ or cause.__context__
    return None


def _error_number(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = OS_ERROR.search(str(error))
    return int(found[1]) if found else None


def _last(folder: Path) -> Path:
    """The file in `folder` that was written to last; the folder, where there is none."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_mtime_ns, default=folder)


def in_bytes(number: int) -> str:
    """As people say it: 1.5 GB."""
    factor, unit = (1e9, "GB") if number >= 1e9 else (1e6, "MB")
    return f"{number / factor:,.1f} {unit}"


def check_name(name: str, path: Path) -> None:
    """
    Raises:
        UserError: nothing can be written to `path`, which was given as `name`, since it has no name for a file.
    """
    try:
        str(path).encode()  # in which the writers of tokenizers and safetensors take it
    except UnicodeEncodeError as error:
        raise UserError(f"{name}: is no name in UTF-8; give another") from error
    if "\0" in str(path):
        raise UserError(f"{name!r}: no file can have this name; give another")


def check_writable(name: str, folder: Path) -> None:
    """
    Raises:
        UserError: `folder`, which was given as `name`, cannot be made or cannot be written to.
    """
    check_name(name, folder)
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
