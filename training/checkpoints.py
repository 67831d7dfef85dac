"""The checkpoints of Trainer: which of them are whole, after a run that was killed while it saved one."""

import math
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from mhmoe.errors import UserError, one_line
from mhmoe.intake import READ, check_file, check_folder, read_json


LARGEST_STATE = 2**30  # bytes of a JSON file: the log of a long run is larger than any file of a model
# FSDP's and DeepSpeed's own folders, which hold weights and optimizer
SHARDED = ("pytorch_model_fsdp*", "global_step*")
SAVED = {".bin", ".jinja", ".json", ".md", ".png", ".pt", ".pth", ".py", ".safetensors"}  # how saved files may end
RESUMED = {"optimizer": "optimizer.*", "scheduler": "scheduler.pt", "random number": "rng_state*.pth"}
# fields of Trainer's state, most of which Trainer first looks at in the middle of a run
INTERVALS = ("logging_steps", "eval_steps")  # by which Trainer divides
NUMBERS = (*INTERVALS, "save_steps", "epoch", "max_steps", "num_train_epochs", "num_input_tokens_seen", "total_flos")
NUMBERS_OR_NULL = ("train_batch_size", "best_metric", "best_global_step")


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints in a run's output folder, the newest first."""
    numbered = {}
    for folder in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*/"):
        step = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdecimal():
            numbered[int(step)] = folder
    return [numbered[step] for step in sorted(numbered, reverse=True)]


def named_as_file(path: Path) -> bool:
    """Whether saving, or reading what was saved, would take `path` for a file: all but folders of other names."""
    return not path.is_dir() or path.name in READ or path.suffix in SAVED


def newest_whole(output: Path, only_model: bool = False) -> tuple[Path | None, dict[Path, str]]:
    """
    The newest whole checkpoint in a run's output folder, `None` if there is none, and what is wrong with every newer
    one.

    Args:
        only_model: whether the run saves no more than the model (`save_only_model`).
    """
    skipped = {}
    for checkpoint in checkpoints(output):
        fault = fault_of(checkpoint, only_model)
        if fault is None:
            return checkpoint, skipped
        skipped[checkpoint] = fault
    return None, skipped


def fault_of(checkpoint: Path, only_model: bool = False) -> str | None:
    """
    Why training cannot go on from a checkpoint where it stopped; `None` if it can. Of large files it is read whether
    they end where they should, not every byte.
    """
    if not (checkpoint / TRAINER_STATE_NAME).is_file():  # which is written last
        return f"no {TRAINER_STATE_NAME}"
    contents = {}
    files = sorted(filter(named_as_file, checkpoint.iterdir()))
    for file in files:
        try:
            check_file(file, checkpoint, math.inf)
            if file.suffix == ".json":
                contents[file.name] = read_json(file, most_bytes=LARGEST_STATE)
        except UserError as error:
            return f"broken {file.name} ({error})"
    try:
        check_folder(checkpoint)
    except UserError as error:
        return str(error)
    if fault := _fault_of_state(contents[TRAINER_STATE_NAME]):
        return fault
    if not any(any(checkpoint.glob(pattern)) for pattern in SHARDED):
        if fault := _fault_of_weights(checkpoint, contents.get(SAFE_WEIGHTS_INDEX_NAME)):
            return fault
        for kind, pattern in () if only_model else RESUMED.items():
            if not any(checkpoint.glob(pattern)):
                return f"no {kind} state"
    for file in files:
        # what torch.save writes has a table of contents at its end
        if file.suffix in (".pt", ".pth", ".bin") and not _is_zip(file):
            return f"{file.name} is cut off or empty"
    return None


def _is_zip(file: Path) -> bool:
    try:
        return zipfile.is_zipfile(file)
    except zipfile.BadZipFile:  # a table that says what cannot be
        return False


def _fault_of_state(state: dict[str, Any]) -> str | None:
    def is_number(value: object) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    if not isinstance(state.get("global_step"), int):
        return f"no global_step in {TRAINER_STATE_NAME}"
    history = state.get("log_history") or []
    if not (isinstance(history, list) and all(isinstance(entry, dict) for entry in history)):
        return f"log_history in {TRAINER_STATE_NAME} is no list of entries"
    for name in (*NUMBERS, *NUMBERS_OR_NULL):
        value = state.get(name, 1)
        null = value is None and name in NUMBERS_OR_NULL
        if not null and (not is_number(value) or (name in INTERVALS and value <= 0)):
            return f"{name} in {TRAINER_STATE_NAME} is {one_line(value)}"
    best = state.get("best_model_checkpoint")
    if not (best is None or isinstance(best, str)):
        return f"best_model_checkpoint in {TRAINER_STATE_NAME} is {one_line(best)}"
    return None


def _fault_of_weights(checkpoint: Path, index: dict[str, Any] | None) -> str | None:
    adapters = [str(file.relative_to(checkpoint)) for file in checkpoint.glob(f"**/{ADAPTER_SAFE_WEIGHTS_NAME}")]
    if (checkpoint / SAFE_WEIGHTS_NAME).is_file():
        names = [SAFE_WEIGHTS_NAME]
    elif index is not None:
        names = sorted(set(index["weight_map"].values()))  # which has been checked with the folder
    elif (checkpoint / WEIGHTS_NAME).is_file():
        names = []  # checked with the other files of torch.save
    elif adapters:
        names = adapters
    else:
        return f"no {SAFE_WEIGHTS_NAME}"
    for name in names:
        try:
            with safe_open(checkpoint / name, framework="pt"):  # which checks sizes and offsets against the file
                pass
        except (SafetensorError, OSError) as error:
            return f"broken {name} ({one_line(error)})"
    return None
