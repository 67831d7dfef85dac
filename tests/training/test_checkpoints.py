"""Which checkpoint a run goes on from after a kill."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from one_step import random_rows
from tiny import tiny_model, tiny_tokenizer
from transformers import Trainer, TrainingArguments

from mhmoe.training.checkpoints import checkpoints, fault_of, newest_whole


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The output folder of a run with checkpoints 1, 2 and 10, the last of which is a copy."""
    output = tmp_path_factory.mktemp("run")
    training_args = TrainingArguments(
        output_dir=str(output), max_steps=2, save_steps=1, use_cpu=True, report_to="none", disable_tqdm=True
    )
    rows = random_rows(0, 0)
    Trainer(tiny_model(), training_args, train_dataset=rows, processing_class=tiny_tokenizer()).train()
    shutil.copytree(output / "checkpoint-2", output / "checkpoint-10")
    (output / "checkpoint-of-mine").mkdir()
    return output


@pytest.fixture
def killed(run, tmp_path) -> Path:
    return shutil.copytree(run, tmp_path / "run")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def replaced(file: Path) -> None:
    file.unlink()
    file.mkdir()


def on_many_disks(file: Path) -> None:
    """The table at the end of a zip file says how many disks it is on."""
    content = file.read_bytes()
    place = content.index(b"PK\x06\x07") + 16
    file.write_bytes(content[:place] + b"\x09" + content[place + 1 :])


def sharded(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00002.safetensors")
    weight_map = '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    (checkpoint / "model.safetensors.index.json").write_text(weight_map)


def with_index(index: str) -> Callable[[Path], None]:
    def harm(checkpoint: Path) -> None:
        (checkpoint / "model.safetensors").unlink()
        (checkpoint / "model.safetensors.index.json").write_text(index)

    return harm


def with_state(**fields: object) -> Callable[[Path], None]:
    def harm(checkpoint: Path) -> None:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        (checkpoint / "trainer_state.json").write_text(json.dumps(state | fields))

    return harm


DAMAGES = {
    "index without files": (with_index('{"weight_map": {}}'), "weight_map={}"),
    "index of another kind": (with_index("[]"), "broken model.safetensors.index.json"),
    "index of numbers": (with_index('{"weight_map": {"a": 1}}'), "weight_map says that 'a' is in 1"),
    "index without end": (with_index("[" * 5000), "broken model.safetensors.index.json"),
    "no state": (lambda folder: (folder / "trainer_state.json").unlink(), "no trainer_state.json"),
    "empty state": (lambda folder: (folder / "trainer_state.json").write_text(""), "broken trainer_state.json"),
    "cut state": (lambda folder: cut(folder / "trainer_state.json"), "broken trainer_state.json"),
    "another state": (lambda folder: (folder / "trainer_state.json").write_text("{}"), "no global_step"),
    "steps as text": (with_state(save_steps="2"), "save_steps in trainer_state.json is '2'"),
    "no interval": (with_state(logging_steps=0), "logging_steps in trainer_state.json is 0"),
    "truth as number": (with_state(epoch=True), "epoch in trainer_state.json is True"),
    "best as text": (with_state(best_metric="low"), "best_metric in trainer_state.json is 'low'"),
    "best elsewhere": (with_state(best_model_checkpoint=1), "best_model_checkpoint in trainer_state.json is 1"),
    "log of another kind": (with_state(log_history=[1]), "log_history in trainer_state.json is no list"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
    "cut weights": (lambda folder: cut(folder / "model.safetensors"), "broken model.safetensors"),
    "empty weights": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "broken model.safetensors"),
    "missing shard": (sharded, "broken model-00002-of-00002.safetensors"),
    "no optimizer": (lambda folder: (folder / "optimizer.pt").unlink(), "no optimizer state"),
    "cut optimizer": (lambda folder: cut(folder / "optimizer.pt"), "optimizer.pt is cut off"),
    "empty scheduler": (lambda folder: (folder / "scheduler.pt").write_bytes(b""), "scheduler.pt is cut off"),
    "no scheduler": (lambda folder: (folder / "scheduler.pt").unlink(), "no scheduler state"),
    "no random numbers": (lambda folder: (folder / "rng_state.pth").unlink(), "no random number state"),
    "cut random numbers": (lambda folder: cut(folder / "rng_state.pth"), "rng_state.pth is cut off"),
    "cut tokenizer": (lambda folder: cut(folder / "tokenizer.json"), "broken tokenizer.json"),
    "disks of a scheduler": (lambda folder: on_many_disks(folder / "scheduler.pt"), "scheduler.pt is cut off"),
    "folder for a file": (
        lambda folder: replaced(folder / "generation_config.json"),
        "config.json: is a fo",
    ),
    "folder for a state": (lambda folder: replaced(folder / "scheduler.pt"), "scheduler.pt: is a folder"),
    "nothing": (lambda folder: [file.unlink() for file in folder.iterdir()], "no trainer_state.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_newest_whole_one_is_found(killed, damage):
    assert newest_whole(killed) == (killed / "checkpoint-10", {})
    harm, fault = DAMAGES[damage]
    harm(killed / "checkpoint-10")
    checkpoint, skipped = newest_whole(killed)
    assert checkpoint == killed / "checkpoint-2"
    ((folder, reason),) = skipped.items()
    assert folder == killed / "checkpoint-10"
    assert fault in reason
    assert "\n" not in reason


def test_without_a_whole_one(killed):
    for folder in checkpoints(killed):
        cut(folder / "optimizer.pt")
    checkpoint, skipped = newest_whole(killed)
    assert checkpoint is None
    assert [folder.name for folder in skipped] == ["checkpoint-10", "checkpoint-2", "checkpoint-1"]
    assert newest_whole(killed / "absent") == (None, {})


def test_run_that_saves_the_model_alone(killed):
    for pattern in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (killed / "checkpoint-10" / pattern).unlink()
    assert fault_of(killed / "checkpoint-10", only_model=True) is None
    assert fault_of(killed / "checkpoint-10") == "no optimizer state"


@pytest.mark.parametrize("folder", ["pytorch_model_fsdp_0", "global_step10"])
def test_weights_in_folders_of_fsdp_and_deepspeed(killed, folder):
    for name in ("model.safetensors", "optimizer.pt"):
        (killed / "checkpoint-10" / name).unlink()
    (killed / "checkpoint-10" / folder).mkdir()
    assert fault_of(killed / "checkpoint-10") is None
