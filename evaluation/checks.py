"""The user's mistakes that can be found before anything is loaded."""

import os
import re
from pathlib import Path

from mhmoe.errors import UserError


def check_model(model: str) -> None:
    """UserError unless `model` is a folder with a config.json, or looks like a model's id on the Hub."""
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{model}: no config.json in this folder; is there a model in it?")
    elif folder.exists():
        raise UserError(f"{model}: a file, not a model folder; give the folder that holds config.json")
    elif not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model):
        raise UserError(f"{model}: no such folder, and not a model id of the Hub")


def check_output(flag: str, path: Path, folder: Path) -> None:
    """UserError about the `path` given with `flag` unless `folder` can be made, or can be written to."""
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path}: {existing} is not a folder that can be written to")
