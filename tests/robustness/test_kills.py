"""
Runs that are cut short at random moments: the same command goes on, and ends where an undisturbed run does, or one
line says how to go on. A few of each; `make kills` cuts every command 100 times.
"""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock

import pytest
import torch
from paths import ROOT
from running import QUIET, SMALL, quiet, run_command
from tiny import save_dense, tiny_model, tiny_tokenizer
from tqdm import tqdm


KILLS = int(os.environ.get("KILLS", "3"))
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
ENDS = {"130": "mhmoe: interrupted", "143": "mhmoe: terminated"}  # by exit code
SIZES = ["--num-moe-heads", "4", "--num-experts", "6", "--moe-intermediate-size", "24", "--max-shard-size", "80KB"]
TEXT = ["--calibration", "{text}", "--calibration-tokens", "400"]
BLOCKS = ["--block_size", "16", "--per_device_train_batch_size", "1"]
TRAINER = [*BLOCKS, "--save_steps", "2", "--save_total_limit", "2", *QUIET, "--seed", "3"]
PRETRAIN = [
    *("--tokenizer_name", "{dense}", "--train_file", "{text}", "--num_train_tokens", "128", "--max_eval_samples", "4"),
]
MODELS = ["--models", "p2-smoe", "p2-mhmoe-head2", "--seeds", "1"]
SMALLEST = ["--config_overrides", "num_hidden_layers=2,hidden_size=48,intermediate_size=64"]


@dataclass
class Run:
    """
    Attributes:
        command: its words.
        go_on: what is added to go on.
        anew: what is added to start anew where there is nothing to go on from; empty where there always is.
        start: the folder that {output} is a copy of when the command begins; empty where there is none.
    """

    command: list[str]
    go_on: list[str] = field(default_factory=list)
    anew: list[str] = field(default_factory=list)
    start: str = ""


RUNS = {
    **{
        f"convert {strategy}": Run(["convert", "{dense}", "{output}", "--strategy", strategy, *SIZES], ["--resume"])
        for strategy in ("exact", "anchored", "random")
    },
    "convert calibrated": Run(
        ["convert", "{dense}", "{output}", "--strategy", "calibrated", *SIZES, *TEXT, "--distillation-steps", "2"],
        ["--resume"],
    ),
    "train": Run(
        ["train", "{mhmoe}", "--train_file", "{text}", "--max_steps", "8", "--output_dir", "{output}", *TRAINER],
        ["--resume_from_checkpoint", "true"],
        ["--overwrite"],
    ),
    "pretrain": Run(
        ["pretrain", "--preset", "p2-mhmoe-head3", *PRETRAIN, *SMALLEST, "--output_dir", "{output}", *TRAINER],
        ["--resume_from_checkpoint", "true"],
        ["--overwrite"],
    ),
    "compare": Run(["compare", *MODELS, *PRETRAIN, *SMALLEST, "--output_dir", "{output}", *BLOCKS, *QUIET]),
    "verify": Run(["verify", "{dense}", "{output}", "--update-card", "--max-tokens", "64"], start="converted"),
    "eval": Run(
        ["eval", "{output}", "--tasks", "mhmoe_smoke", "--limit", "2", "--device", "cpu", "--update_card"],
        start="converted",
    ),
}
WRITING = [name for name, run in RUNS.items() if not run.start]  # whole folders
# what two runs write otherwise
TIMES = ("tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second")
VARIES = ("training_args.bin", "trainer_state.json", "comparison.md", "comparison.png")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    places = {name: folder / name for name in ("dense", "mhmoe", "converted", "text")}
    save_dense(places["dense"])
    tiny_model(pad_token_id=None).save_pretrained(places["mhmoe"])
    tiny_tokenizer().save_pretrained(places["mhmoe"])
    places["text"] = folder / "text.txt"
    places["text"].write_text("The quick brown fox jumps over the lazy dog. " * 60)
    with quiet():
        assert run_command(["convert", str(places["dense"]), str(places["converted"]), *SMALL]) is None
    return places


class Child:
    """A command in a process of its own."""

    def __init__(self, command: list[str], bytes_a_file: int | None = None):
        context = multiprocessing.get_context("fork")  # the imports, which take seconds, are done
        self._messages, ours = context.Pipe(duplex=False)
        self._process = context.Process(target=self._work, args=(command, ours, bytes_a_file))
        self._process.start()
        ours.close()

    @staticmethod
    def _work(command: list[str], messages, bytes_a_file: int | None) -> None:
        torch.set_num_threads(1)  # the pool of the parent's threads does not survive the fork
        tqdm.set_lock(RLock())  # its own is one semaphore of all forks, which one that is killed may hold forever
        if bytes_a_file is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_a_file, bytes_a_file))
        with quiet() as said:
            message = run_command(command)
        assert "Traceback" not in said.getvalue()
        if message in ENDS:
            message = said.getvalue().splitlines()[-1]
            assert message in ENDS.values()
        messages.send(message)

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


def begin(run: Run, sources: dict[str, Path], output: Path) -> None:
    """Make `output` what it is before the command."""
    shutil.rmtree(output, ignore_errors=True)
    shutil.rmtree(output.with_name(output.name + ".partial"), ignore_errors=True)
    if run.start:
        shutil.copytree(sources[run.start], output)


def go_on(run: Run, command: list[str]) -> None:
    """To the end, from what a run that was cut short has left."""
    if (message := run_to_its_end([*command, *run.go_on])) is not None:
        assert message.startswith("mhmoe: error: "), message
        assert run.anew, message
        assert run_to_its_end([*command, *run.anew]) is None


def contents(folder: Path) -> dict[str, bytes | dict]:
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: without_times(json.loads(path.read_text())) if path.suffix == ".json" else path.read_bytes()
        for name, path in files.items()
        if path.name not in VARIES and "checkpoint-" not in name
    }


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(inner) for key, inner in value.items() if key not in TIMES}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


def words(command: list[str], sources: dict[str, Path], output: Path) -> list[str]:
    return [word.format(**sources, output=output) if word.startswith("{") else word for word in command]


@pytest.mark.parametrize("name", RUNS)
def test_killed_at_any_moment(name, sources, tmp_path):
    run, output, chance = RUNS[name], tmp_path / "output", random.Random(name)
    command = words(run.command, sources, output)
    seconds = 0.0
    for _ in range(2):  # the first one warms up
        begin(run, sources, output)
        start = time.perf_counter()
        assert run_to_its_end(command) is None
        seconds = time.perf_counter() - start
    expected = contents(output)
    assert any(file.endswith(".safetensors") for file in expected)
    cut = 0
    for number in range(KILLS):
        begin(run, sources, output)
        child = Child(command)
        time.sleep(chance.uniform(0, seconds))
        child.kill(SIGNALS[number % len(SIGNALS)])
        ended, message = child.wait()
        cut += not ended
        assert message is None or message in ENDS.values()
        if not ended:
            go_on(run, command)
        assert contents(output) == expected
        assert [path.name for path in tmp_path.iterdir()] == ["output"]
    assert cut


@contextmanager
def disk(folder: Path, kilobytes: int):
    """A disk of so many kilobytes at `folder`; a function that makes it larger."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder]
    if os.geteuid() or subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        yield lambda more: subprocess.run(["mount", "-o", f"remount,size={more}k", folder], check=True)
    finally:
        subprocess.run(["umount", folder], check=True)


def check_full(message: str | None) -> None:
    """One line, which names a file that is being made, not one of the program, and why it was not written."""
    assert message, "a traceback"
    assert message.startswith("mhmoe: error: ")
    assert "\n" not in message
    assert any(reason in message for reason in ("the disk is full", "may not be so large", "the disk has")), message
    file = Path(message.removeprefix("mhmoe: error: ").partition(": ")[0])
    assert not file.is_relative_to(ROOT)


@pytest.mark.parametrize("kilobytes", [300, *([40, 150, 500, 700, 1100, 1500] if KILLS >= 100 else [])])
@pytest.mark.parametrize("name", WRITING)
def test_a_full_disk(name, kilobytes, sources, tmp_path):
    run, output = RUNS[name], tmp_path / "disk" / "output"
    command = words(run.command, sources, output)
    with disk(tmp_path / "disk", kilobytes) as enlarge:
        ended, message = Child(command).wait()
        if ended:
            return
        check_full(message)
        enlarge(20_000)
        go_on(run, command)
        assert (output / "comparison.md").is_file() or any(output.glob("*.safetensors"))


@pytest.mark.parametrize("name", WRITING)
def test_files_may_not_be_so_large(name, sources, tmp_path):
    """What a limit does on a disk with room: a write fails in its middle."""
    run, output = RUNS[name], tmp_path / "output"
    command = words(run.command, sources, output)
    ended, message = Child(command, bytes_a_file=20_000).wait()
    assert not ended
    check_full(message)
    go_on(run, command)


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("convert")])
def test_two_at_once(name, sources, tmp_path):
    command = words(RUNS[name].command, sources, tmp_path / "output")
    results = [child.wait() for child in [Child(command), Child(command)]]
    assert any(ended for ended, _ in results)
    for ended, message in results:
        assert ended or (message.startswith("mhmoe: error: ") and "\n" not in message)
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells by /proc how far a process has come")
@pytest.mark.parametrize("number", range(max(KILLS // 10, 1)))
def test_interrupted_while_it_starts(number, sources, tmp_path):
    command = words(RUNS["convert exact"].command, sources, tmp_path / "output")
    process = subprocess.Popen([sys.executable, "-m", "mhmoe", *command], stderr=subprocess.PIPE, text=True)
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "torch" not in maps.read_text():
        time.sleep(0.01)
    time.sleep(random.Random(number).uniform(0, 2))
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode in (0, 130)
    assert "Traceback" not in said
    assert process.returncode == 0 or said.splitlines()[-1] == "mhmoe: interrupted"
