"""Runs a case in this process, as the command line would, and says what is wrong with what came of it."""

import io
import os
import shutil
import signal
import sys
import traceback
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from cases import Case, apply
from tiny import save_dense, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from mhmoe import cli


SECONDS = 10
SMALL = ["--num-moe-heads", "2", "--num-experts", "4", "--moe-intermediate-size", "24"]
CONVERT = [["convert", "{model}", "{output}", "--strategy", name, *SMALL] for name in ("exact", "anchored", "random")]
CALIBRATE = [*CONVERT[0][:4], "calibrated", *SMALL[:4], "--calibration", "{text}", "--calibration-tokens", "200"]
DENSE = [*CONVERT, CONVERT[0], CONVERT[0], [*CALIBRATE, "--distillation-steps", "1"], ["plan", "{model}"]]
TRAINING = ["--train_file", "{text}", "--block_size", "16", "--max_steps", "1", "--per_device_train_batch_size", "1"]
MHMOE = [
    ["train", "{model}", *TRAINING, "--output_dir", "{output}", "--report_to", "none", "--disable_tqdm", "true"],
    ["routing", "{model}", "--text", "{text}", "--max_tokens", "50", "--output_path", "{output}"],
    ["verify", "{dense}", "{model}"],
    ["verify", "{dense}", "{model}"],
]
FAMILIES = {
    "llama": {},
    "llama, three shards": {"max_shard_size": "60KB", "attention_bias": True},
    "mistral": {"sliding_window": 6},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 20},
    "smollm3": {"no_rope_layer_interval": 2},
}


class Deadline(BaseException):
    """The time is up; no handler of the program's may take it for a mistake of the user's."""


@dataclass
class Outcome:
    """
    Attributes:
        kind: "done", "refused", or what is wrong: "traceback", "hang", "leftover", "message", "wrong result".
        detail: the message, or what was found.
    """

    kind: str
    detail: str = ""

    @property
    def fine(self) -> bool:
        return self.kind in ("done", "refused")


def make_bases(folder: Path) -> dict[str, tuple[Path, list[list[str]]]]:
    """By name, a folder and the commands that are for it."""
    bases = {}
    for name, fields in FAMILIES.items():
        dense = folder / name
        save_dense(dense, family=name.partition(",")[0], **fields)
        bases[name] = (dense, DENSE)
    own = folder / "mhmoe"
    tiny_model(pad_token_id=None).save_pretrained(own)
    tiny_tokenizer().save_pretrained(own)
    (own / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    (own / "LICENSE").write_text("You may.\n")
    bases["mhmoe"] = (own, MHMOE[:2])
    converted = folder / "converted"
    with quiet():
        run_command(["convert", str(folder / "llama"), str(converted), *SMALL])
    bases["converted"] = (converted, MHMOE)
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return bases


def run(case: Case, bases: dict[str, tuple[Path, list[list[str]]]], folder: Path) -> Outcome:
    """`folder` is empty, and may hold anything afterwards."""
    base, _ = bases[case.base]
    model, dense, output = folder / "model", folder / "dense", folder / "output"
    shutil.copytree(base, model)
    dense.symlink_to(base.parent / "llama")
    for edit in case.edits:
        apply(edit, model)
    words = {"model": model, "dense": dense, "output": output, "text": base.parent / "text.txt"}
    command = [word.format(**words) if word.startswith("{") else word for word in case.command]
    before = {path.name for path in folder.iterdir()}
    try:
        with deadline(SECONDS), quiet(), inside(folder):
            message = run_command(command)
    except Deadline:
        return Outcome("hang", f"more than {SECONDS} s")
    except BaseException as error:
        return Outcome("traceback", "".join(traceback.format_exception(error))[-3000:])
    if message is not None:
        left = {path.name for path in folder.iterdir()} - before
        if left:
            return Outcome("leftover", f"{sorted(left)} after: {message}")
        if "\n" in message or not message.startswith("mhmoe: error: ") or len(message) > 1500:
            return Outcome("message", message)
        return Outcome("refused", message)
    if command[0] == "convert":
        with deadline(60), quiet():
            return check_conversion(model, output, "exact" in command)
    return Outcome("done")


def run_command(command: list[str]) -> str | None:
    """The message of a refusal; None where the command ended well."""
    argv, sys.argv = sys.argv, ["mhmoe", *command]
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        cli.main()
    except SystemExit as error:
        return str(error.code) if error.code not in (None, 0) else None
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, terminate)
    return None


def check_conversion(model: Path, output: Path, exact: bool) -> Outcome:
    """What was converted loads; and after strategy exact it has the dense model's logits, to the bit."""
    input_ids = torch.randint(0, 8, (1, 12), generator=torch.Generator().manual_seed(0))

    def logits(folder: Path) -> torch.Tensor:
        with torch.no_grad():
            # which code computes the attention is no part of the model
            model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="sdpa")
            return model.eval()(input_ids).logits

    try:
        converted = logits(output)
    except Exception as error:
        return Outcome("wrong result", f"exit 0, and it does not load: {type(error).__name__}: {error}")
    try:
        dense = logits(model)
    except Exception as error:
        return Outcome(
            "wrong result", f"exit 0, though the dense model does not load: {type(error).__name__}: {error}"
        )
    if exact and not torch.equal(converted.nan_to_num(7.0), dense.nan_to_num(7.0)):
        return Outcome("wrong result", f"logits differ by {(converted - dense).abs().max()}")
    return Outcome("done")


@contextmanager
def deadline(seconds: float):
    def ring(*_):
        raise Deadline

    # of this process's own work, and of waiting, of which a busy machine makes some
    timers = {signal.SIGPROF: (signal.ITIMER_PROF, seconds), signal.SIGALRM: (signal.ITIMER_REAL, 6 * seconds)}
    handlers = {number: signal.signal(number, ring) for number in timers}
    for timer, limit in timers.values():
        signal.setitimer(timer, limit, 1)  # again, where the first fell into a callback that ate it
    try:
        yield
    finally:
        for timer, _ in timers.values():
            signal.setitimer(timer, 0)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def quiet():
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


@contextmanager
def inside(folder: Path):
    here = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)
