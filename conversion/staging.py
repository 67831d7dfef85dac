"""A new folder that appears whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mhmoe.errors import UserError


@contextmanager
def staged_folder(output: Path, overwrite: bool, keep: Path) -> Iterator[Path]:
    """
    Yield an empty folder beside `output`; it becomes `output` when the block ends well and vanishes when it does not.

    Args:
        output: the folder to make. An existing one is replaced, at the end, with `overwrite` alone.
        overwrite: whether the user asked for that.
        keep: the source, which must not be inside `output`.

    Raises:
        UserError: `output` exists and may not be replaced, or cannot be written.
    """
    check_output(output, overwrite, keep)
    made_parents = [parent for parent in output.parents if not parent.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}); choose another OUTPUT") from error
    try:
        folder = stage / "new"
        folder.mkdir()
        yield folder
        if output.exists():
            output.rename(stage / "old")
        folder.rename(output)
    except OSError as error:
        raise UserError(f"{error.filename or output}: cannot be written ({error.strerror or error})") from error
    finally:
        if not output.exists() and (stage / "old").exists():
            (stage / "old").rename(output)
        shutil.rmtree(stage, ignore_errors=True)
        if not output.exists():
            for parent in made_parents:
                parent.rmdir()


def check_output(output: Path, overwrite: bool, keep: Path) -> None:
    """Raise a [`UserError`] if `output` exists and may not be replaced."""
    if not (output.exists() or output.is_symlink()):
        return
    if not overwrite:
        raise UserError(f"{output}: exists already; give another OUTPUT, or --overwrite to replace it")
    if keep.resolve().is_relative_to(output.resolve()):
        raise UserError(f"{output}: holds the source itself; give another OUTPUT")
    if not output.is_dir() or output.is_symlink():
        raise UserError(f"{output}: --overwrite replaces model folders, and this is none; remove it yourself")
    if any(output.iterdir()) and not (output / "config.json").is_file():
        raise UserError(
            f"{output}: --overwrite replaces folders with a config.json, and this has none; remove it yourself"
        )
