"""A new folder that appears whole or not at all, and that a killed conversion can continue to fill."""

import json
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from mhmoe.errors import UserError, WriteError, one_line
from mhmoe.files import refusal_of
from mhmoe.intake import read_json

from .writer import PART_SUFFIX


try:
    import fcntl
except ImportError:  # Windows: two conversions into one folder go unnoticed
    fcntl = None

JOURNAL = "journal.json"  # which conversion the stage belongs to
NEW, OLD = "new", "old"  # the folder that is being filled, and the one that it replaces
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@contextmanager
def staged_folder(output: Path, overwrite: bool, keep: Path, settings: dict, resume: bool) -> Generator[Path]:
    """
    Yield a folder inside `OUTPUT.partial`, beside `output`; it becomes `output` when the block ends well. When the
    block fails, everything vanishes; with `resume`, weights that are written stay. What a killed process left stays as
    well.

    Args:
        output: the folder to make. An existing one is replaced, at the end, with `overwrite` alone.
        overwrite: whether the user asked for that, and for starting afresh where something is left.
        keep: the source, which must not be inside `output`.
        settings: all that decides the bytes to be written, as JSON can hold it.
        resume: continue what is left of a conversion with the same settings. The yielded folder then holds it, and is
            empty otherwise.

    Raises:
        UserError: `output` exists and may not be replaced, or cannot be written; another process is at it; or what is
            left may not be continued or removed.
    """
    stage = stage_of(output)
    settings = json.loads(json.dumps(settings))  # as it reads back
    with _locked(stage, create=True) as made_parents:
        try:
            _put_back(stage, output)
            check_output(output, overwrite, keep)
            folder = _prepared(stage, settings, overwrite, resume)
        except BaseException:
            if not any(stage.iterdir()):
                stage.rmdir()
                _remove_empty(made_parents)
            raise
        finished = False
        try:
            yield folder
            if output.exists():
                output.rename(stage / OLD)
            folder.rename(output)
            finished = True
            if (stage / OLD).exists():
                (stage / OLD).rename(folder)  # from here on nothing would put it back
        except UserError:
            raise
        except Exception as error:
            if (refusal := refusal_of(error, folder)) is not None:
                raise WriteError(refusal, "mend that, or give another OUTPUT") from error
            if not isinstance(error, OSError):
                raise
            raise UserError(f"{error.filename or output}: cannot be written ({error.strerror or error})") from error
        finally:
            _put_back(stage, output)
            if finished or not (resume and any(folder.glob("*.safetensors*"))):  # the rest is copied in no time
                shutil.rmtree(stage, ignore_errors=True)
            if not finished:
                _remove_empty(made_parents)


def stage_of(output: Path) -> Path:
    """Where `output` is made."""
    output = Path(os.path.abspath(output))
    return output.with_name(output.name + ".partial")


def discard_stage(output: Path) -> None:
    """Remove what a process left that was killed just after it had made `output`."""
    stage = stage_of(output)
    if stage.is_dir() and not _foreign(stage):
        with _locked(stage):
            shutil.rmtree(stage)


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


@contextmanager
def _locked(stage: Path, create: bool = False) -> Generator[list[Path]]:
    """Hold the lock on the folder `stage`, which ends with this process; yield the parents that had to be made."""
    made_parents = [parent for parent in stage.parents if not parent.exists()]
    try:
        if create:
            stage.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(stage, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW) if fcntl else None
    except OSError as error:
        _remove_empty(made_parents)
        raise UserError(f"{stage}: cannot be written ({error.strerror}); choose another OUTPUT") from error
    try:
        if fcntl and descriptor is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                ours = os.path.samestat(os.fstat(descriptor), stage.stat())
            except (BlockingIOError, FileNotFoundError):
                ours = False
            except OSError:  # a file system without locks, where they go unnoticed too
                ours = True
            if not ours:
                raise UserError(f"{stage}: another conversion is writing there; wait for it, or give another OUTPUT")
        yield made_parents
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _prepared(stage: Path, settings: dict, overwrite: bool, resume: bool) -> Path:
    """The folder to fill, inside a `stage` that may hold what another process left."""
    if foreign := _foreign(stage):
        raise UserError(f"{stage / foreign[0]}: not made by mhmoe convert; move it, or give another OUTPUT")
    folder, journal = stage / NEW, stage / JOURNAL
    shutil.rmtree(stage / OLD, ignore_errors=True)  # replaced already, or it would have been put back
    if not journal.exists():
        shutil.rmtree(folder, ignore_errors=True)  # a journal is there before, and gone while the folder is removed
    else:
        left = read_json(journal, f"remove {stage}")
        if not isinstance(left.get("settings"), dict):
            raise UserError(f"{journal}: settings={one_line(left.get('settings'))} are none; remove {stage}")
        if resume:
            if changed := _changed(left["settings"], settings):
                raise UserError(
                    f"{stage}: was left by a conversion with another {changed}; "
                    "repeat its command, or remove that folder and start again"
                )
            if not _boot() or left.get("boot") != _boot():  # what the kernel had not yet put on the disk is lost
                for part in folder.glob("*" + PART_SUFFIX):
                    part.unlink()
        elif overwrite:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            raise UserError(
                f"{stage}: was left by a conversion that was killed; add --resume to finish it, or remove that folder"
            )
    part = journal.with_name(JOURNAL + PART_SUFFIX)
    part.write_text(json.dumps({"settings": settings, "boot": _boot()}, indent=2))
    part.replace(journal)
    folder.mkdir(exist_ok=True)
    return folder


def _foreign(stage: Path) -> list[str]:
    return sorted({path.name for path in stage.iterdir()} - {JOURNAL, JOURNAL + PART_SUFFIX, NEW, OLD})


def _put_back(stage: Path, output: Path) -> None:
    """Undo half of a replacement."""
    if (stage / OLD).exists() and not output.exists():
        (stage / OLD).rename(output)


def _changed(old: dict, new: dict) -> str:
    """The first entry in which two settings differ, named for a message; empty if none does."""
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            if inner := _changed(a, b):
                return f"{key} {inner}"
        elif a != b:
            return f"{key} ({a})" if isinstance(a, str | int | None) else key
    return ""


def _boot() -> str:
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
