"""The user's mistakes that can be found before anything is loaded."""

import re
from pathlib import Path

from mhmoe.errors import UserError, one_line


def check_model(model: str) -> None:
    """UserError unless `model` is a folder with a config.json, or looks like a model's id on the Hub."""
    folder = Path(model)
    try:
        exists = folder.exists()
    except OSError:  # a name that no file can have
        exists = False
    if exists and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{model}: no config.json in this folder; is there a model in it?")
    elif exists:
        raise UserError(f"{model}: a file, not a model folder; give the folder that holds config.json")
    elif not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model):
        raise UserError(f"{model}: no such folder, and not a model id of the Hub")


def check_device(flag: str, device: str) -> None:
    """UserError unless torch can compute on the `device` given with `flag`."""
    import torch

    try:
        torch.zeros(1, device=device).item()  # which a device without numbers, "meta", cannot say
    except (RuntimeError, AssertionError) as error:  # the latter from builds without CUDA
        raise UserError(f"{flag} {device}: cannot be used ({one_line(error)})") from error
