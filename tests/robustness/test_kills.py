"""
Runs that are cut short at random moments: the same command goes on, and ends where an undisturbed run does, or one
line says how to go on. A few of each; `make kills` cuts every command 100 times.
"""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from running import quiet, run_command
from tiny import save_dense, tiny_model, tiny_tokenizer


KILLS = int(os.environ.get("KILLS", "3"))
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
SIZES = ["--num-moe-heads", "4", "--num-experts", "6", "--moe-intermediate-size", "24", "--max-shard-size", "80KB"]
TEXT = ["--calibration", "{text}", "--calibration-tokens", "400"]
TRAINER = [
    *("--block_size", "16", "--per_device_train_batch_size", "1", "--save_steps", "2", "--save_total_limit", "2"),
    *("--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true", "--seed", "3"),
]
PRETRAIN = [
    *("--tokenizer_name", "{dense}", "--train_file", "{text}", "--num_train_tokens", "128", "--max_eval_samples", "4"),
]
MODELS = ["--models", "p2-smoe", "p2-mhmoe-head2", "--seeds", "1"]
SMALL = ["--config_overrides", "num_hidden_layers=2,hidden_size=48,intermediate_size=64"]
# by name: a command, what is added to go on, and what is added to start anew where there is nothing to go on from
COMMANDS = {
    **{
        f"convert {strategy}": (["convert", "{dense}", "{output}", "--strategy", strategy, *SIZES], ["--resume"], [])
        for strategy in ("exact", "anchored", "random")
    },
    "convert calibrated": (
        ["convert", "{dense}", "{output}", "--strategy", "calibrated", *SIZES, *TEXT, "--distillation-steps", "2"],
        ["--resume"],
        [],
    ),
    "train": (
        ["train", "{mhmoe}", "--train_file", "{text}", "--max_steps", "8", "--output_dir", "{output}", *TRAINER],
        ["--resume_from_checkpoint", "true"],
        ["--overwrite"],
    ),
    "pretrain": (
        ["pretrain", "--preset", "p2-mhmoe-head3", *PRETRAIN, *SMALL, "--output_dir", "{output}", *TRAINER],
        ["--resume_from_checkpoint", "true"],
        ["--overwrite"],
    ),
    "compare": (["compare", *MODELS, *PRETRAIN, *SMALL, "--output_dir", "{output}", *TRAINER[:4]], [], []),
}
# what a run may write otherwise each time: times, and Trainer's own logs
VARIES = (
    "training_args.bin",
    "trainer_state.json",
    "pretraining.json",
    "comparison.json",
    "comparison.md",
    "README.md",
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    dense, mhmoe, text = folder / "dense", folder / "mhmoe", folder / "text.txt"
    save_dense(dense)
    tiny_model(pad_token_id=None).save_pretrained(mhmoe)
    tiny_tokenizer().save_pretrained(mhmoe)
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    return {"dense": dense, "mhmoe": mhmoe, "text": text}


class Child:
    """A command in a process of its own; of what it says, the last line of a refusal."""

    def __init__(self, command: list[str], bytes_a_file: int | None = None):
        context = multiprocessing.get_context("fork")  # the imports, which take seconds, are done
        self._messages, ours = context.Pipe(duplex=False)
        self._process = context.Process(target=self._work, args=(command, ours, bytes_a_file))
        self._process.start()
        ours.close()

    @staticmethod
    def _work(command: list[str], messages, bytes_a_file: int | None) -> None:
        torch.set_num_threads(1)  # the pool of the parent's threads does not survive the fork
        if bytes_a_file is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_a_file, bytes_a_file))
        with quiet():
            messages.send(run_command(command))

    def kill(self, signal_number: int) -> None:
        if self._process.is_alive():
            os.kill(self._process.pid, signal_number)

    def wait(self) -> tuple[bool, str | None]:
        """Whether it ended well, and its message otherwise; None if it could say none."""
        try:
            message = self._messages.recv()
            ended = message is None
        except EOFError:
            ended, message = False, None
        self._process.join()
        return ended, message


def run_to_its_end(command: list[str]) -> str | None:
    ended, message = Child(command).wait()
    assert ended or message, "a traceback"
    return message


def contents(folder: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: path.read_bytes()
        for name, path in files.items()
        if not name.endswith(VARIES) and "checkpoint-" not in name
    }


def words(command: list[str], sources: dict[str, Path], output: Path) -> list[str]:
    return [word.format(**sources, output=output) if word.startswith("{") else word for word in command]


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_any_moment(name, sources, tmp_path):
    command, go_on, anew = COMMANDS[name]
    output, chance = tmp_path / "output", random.Random(name)
    command = words(command, sources, output)
    seconds = 0.0
    for _ in range(2):  # the first one warms up
        shutil.rmtree(output, ignore_errors=True)
        start = time.perf_counter()
        assert run_to_its_end(command) is None
        seconds = time.perf_counter() - start
    expected = contents(output)
    assert any(file.endswith(".safetensors") for file in expected)
    cut = 0
    for _ in range(KILLS):
        shutil.rmtree(output, ignore_errors=True)
        child = Child(command)
        time.sleep(chance.uniform(0, seconds))
        child.kill(chance.choice(SIGNALS))
        ended, message = child.wait()
        cut += not ended
        assert message is None or "\n" not in message
        if not ended and (message := run_to_its_end([*command, *go_on])) is not None:
            assert message.startswith("mhmoe: error: "), message
            assert anew, message
            assert run_to_its_end([*command, *anew]) is None
        assert contents(output) == expected
        assert [path.name for path in tmp_path.iterdir()] == ["output"]
    assert cut


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk(name, sources, tmp_path):
    """Stood in for by a limit on the size of a file, which fails a write in its middle."""
    command, go_on, anew = COMMANDS[name]
    output = tmp_path / "output"
    command = words(command, sources, output)
    ended, message = Child(command, bytes_a_file=20_000).wait()
    assert not ended
    assert message.startswith("mhmoe: error: ")
    assert "\n" not in message
    if (message := run_to_its_end([*command, *go_on])) is not None:
        assert run_to_its_end([*command, *anew]) is None, message


@pytest.mark.parametrize("name", [name for name in COMMANDS if name.startswith("convert")])
def test_two_at_once(name, sources, tmp_path):
    command = words(COMMANDS[name][0], sources, tmp_path / "output")
    results = [child.wait() for child in [Child(command), Child(command)]]
    assert any(ended for ended, _ in results)
    for ended, message in results:
        assert ended or (message.startswith("mhmoe: error: ") and "\n" not in message)
    assert [path.name for path in tmp_path.iterdir()] == ["output"]
