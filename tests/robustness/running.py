"""Runs a case in this process, as the command line would, and says what is wrong with what came of it."""

import io
import logging
import os
import resource
import shutil
import signal
import sys
import traceback
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from cases import RAN, SECRET, TEXT, Case, apply
from tiny import save_dense, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from mhmoe import cli
from mhmoe.conversion.families import FAMILIES as CONVERTED_TYPES


SECONDS = 10
MEMORY = 8 * 2**30  # bytes; no command may want more for a tiny model
SMALL = ["--num-moe-heads", "2", "--num-experts", "4", "--moe-intermediate-size", "24"]
CONVERT = [["convert", "{model}", "{output}", "--strategy", name, *SMALL] for name in ("exact", "anchored", "random")]
CALIBRATE = [*CONVERT[0][:4], "calibrated", *SMALL[:4], "--calibration", "{text}", "--calibration-tokens", "200"]
CONVERSIONS = [*CONVERT, CONVERT[0], CONVERT[0], [*CALIBRATE, "--distillation-steps", "1"]]
QUIET = ["--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true"]
STEP = ["--block_size", "16", "--per_device_train_batch_size", "1", *QUIET]
TRAIN = ["--train_file", "{text}", *STEP]
PRETRAIN = ["--train_file", "{text}", "--max_eval_samples", "2", *STEP]
SMALLEST = ["--config_overrides", "num_hidden_layers=1,hidden_size=24,intermediate_size=32"]
EVAL = ["eval", "{model}", "--tasks", "mhmoe_smoke", "--limit", "2", "--batch_size", "2", "--device", "cpu"]
TO_OUTPUT, TO_MODEL = (
    ["--max_steps", "1", "--output_dir", "{output}"],
    ["--save_steps", "1", "--output_dir", "{model}"],
)
RESUMED = ["--resume_from_checkpoint", "true"]
ANY_MODEL = [
    ["train", "{model}", *TRAIN, *TO_OUTPUT],
    [*EVAL, "--output_path", "{output}"],
    [*EVAL, "--apply_chat_template"],
    ["params", "{model}"],
    ["pretrain", "--config_name", "{model}", "--tokenizer_name", "{model}", *PRETRAIN, *TO_OUTPUT],
]
DENSE = [*CONVERSIONS, *CONVERSIONS, ["plan", "{model}"], ["plan", "{model}"], ["verify", "{model}", "{converted}"]]
DENSE += ANY_MODEL
MHMOE = [
    *ANY_MODEL,
    ["train", "{model}", *TRAIN, "--validation_file", "{text}", *TO_OUTPUT],
    ["routing", "{model}", "--text", "{text}", "--max_tokens", "50", "--output_path", "{output}"],
    ["routing", "{dense}", "{model}", "--text", "{text}", "--max_tokens", "50"],
    [*EVAL, "--update_card"],
]
CONVERTED = [*MHMOE, *[["verify", "{dense}", "{model}"]] * 3, *[["verify", "{dense}", "{model}", "--update-card"]] * 3]
# commands that go on with what lies in the folder
RESUME = [["train", "{mhmoe}", *TRAIN, "--max_steps", "2", *TO_MODEL, *RESUMED]]
PRETRAINING = [
    [
        *("pretrain", "--preset", "p2-mhmoe-head2", *SMALLEST, "--tokenizer_name", "{dense}", *PRETRAIN),
        *("--max_steps", "2", *TO_MODEL, *RESUMED),
    ]
]
COMPARE = ["--vocab_size", "260", *SMALLEST, *PRETRAIN, "--max_steps", "1", "--output_dir", "{model}"]
COMPARISON = [["compare", "--models", "p2-smoe", *seeds, *COMPARE] for seeds in ([], ["--seeds", "0", "1"])]
NEW_MODEL = [["compare", "--models", "{model}", "--tokenizer_name", "{dense}", *PRETRAIN, *TO_OUTPUT]]
FAMILIES = {
    "llama": {},
    "llama, three shards": {"max_shard_size": "60KB", "attention_bias": True},
    "mistral": {"sliding_window": 6},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 20},
    "smollm3": {"no_rope_layer_interval": 2},
    "ministral": {"head_dim": 12, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "cwm": {"head_dim": 16, "sliding_window": 6},
    "internlm3": {"qkv_bias": True, "bias": True, "head_dim": 16},
}
FAMILIES = {name: fields for name, fields in FAMILIES.items() if name.partition(",")[0] in CONVERTED_TYPES}
EVIL = f"""import os
os.makedirs("{RAN}", exist_ok=True)
class Evil:
    pass
"""


class Deadline(BaseException):
    """The time is up; no handler of the program's may take it for a mistake of the user's."""


@dataclass
class Outcome:
    """
    Attributes:
        kind: "done", "refused", or what is wrong: "traceback", "hang", "leftover", "message", "wrong result", "code".
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
        bases[name] = (dense, [*DENSE, *NEW_MODEL])
    own = folder / "mhmoe"
    tiny_model(pad_token_id=None).save_pretrained(own)
    tiny_tokenizer().save_pretrained(own)
    (own / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    (own / "LICENSE").write_text("You may.\n")
    bases["mhmoe"] = (own, [*MHMOE, *NEW_MODEL])
    sentence = "The quick brown fox jumps over the lazy dog."
    (folder / "text.jsonl").write_text("".join(f'{{"text": "{n}. {sentence}"}}\n' for n in range(40)))
    made = {
        "converted": (["convert", "{dense}", "{model}", *SMALL], CONVERTED),
        "run": ([*RESUME[0][:-2]], RESUME),
        "pretraining": ([*PRETRAINING[0][:-2]], PRETRAINING),
        "comparison": (COMPARISON[0], COMPARISON),
    }
    for name, (command, commands) in made.items():
        words = {"dense": folder / "llama", "mhmoe": own, "text": folder / "text.jsonl", "model": folder / name}
        with inside(folder), quiet():
            message = run_command(in_words(command, words))
        assert message is None, message
        bases[name] = (folder / name, commands)
    for base, _ in bases.values():
        (base / "evil.py").write_text(EVIL)
    return bases


def in_words(command: list[str], words: dict[str, Path]) -> list[str]:
    """The command with its words in braces filled in."""
    filled = []
    for word in command:
        for name, value in words.items():
            word = word.replace(f"{{{name}}}", str(value))
        filled.append(word)
    return filled


def run(case: Case, bases: dict[str, tuple[Path, list[list[str]]]], folder: Path) -> Outcome:
    """`folder` is empty, and may hold anything afterwards."""
    home = bases["llama"][0].parent
    model, output = folder / "model", folder / "output"
    if case.fields:
        save_dense(model, family=case.base, **case.fields)
    else:
        shutil.copytree(bases[case.base][0], model)
    words = {"model": model, "output": output, "text": model.parent / Path(TEXT).name, "case": folder}
    for name, base in (("dense", "llama"), ("mhmoe", "mhmoe"), ("converted", "converted"), ("outside", case.base)):
        words[name] = folder / name
        words[name].symlink_to(home / base)
    shutil.copy2(home / "text.jsonl", words["text"])
    (folder / "secret.txt").write_text(SECRET)
    (folder / "dangling").symlink_to("nowhere")
    (folder / "occupied").mkdir()
    (folder / "occupied" / "mine").write_text("not to be lost")
    for edit in case.edits:
        apply(edit, model)
    command = in_words(case.command, words)
    before = state_of(folder)
    shown = Tracebacks()
    try:
        with limits(), quiet() as said, shown, inside(folder):
            message = run_command(command)
    except Deadline as error:
        return Outcome("hang", f"more than {SECONDS} s\n" + "".join(traceback.format_exception(error))[-2000:])
    except BaseException as error:
        return Outcome("traceback", "".join(traceback.format_exception(error))[-3000:])
    after = state_of(folder)
    if any(Path(file).name == RAN for file in after):
        return Outcome("code", "the folder's own code was run")
    if shown.found or "Traceback (most recent call last)" in said.getvalue():
        return Outcome("traceback", f"in what is said: {(shown.found or [said.getvalue()])[0][-3000:]}")
    if message is not None:
        # a comparison keeps the runs that did not fail
        if changed := {} if "error: failed: " in message else before.items() ^ after.items():
            return Outcome("leftover", f"{sorted({name for name, _ in changed})} after: {message}")
        if not message.isprintable() or not message.startswith("mhmoe: error: ") or len(message) > 1500:
            return Outcome("message", message)
        return Outcome("refused", message)
    if lost := [file for file in before if file not in after and not file.startswith(("model", "output"))]:
        return Outcome("wrong result", f"lost: {lost}")
    if "{output}" in case.command and output.is_dir():
        with deadline(60), quiet():
            return check_output(case, model, output)
    return Outcome("done")


def state_of(folder: Path) -> dict[str, tuple]:
    """By path, what would show that a file was changed."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[str(path.relative_to(folder))] = (status.st_mode, 0 if path.is_dir() else status.st_mtime_ns)
    return found


def run_command(command: list[str]) -> str | None:
    """The message of a refusal; None where the command ended well."""
    argv, sys.argv = sys.argv, ["mhmoe", *command]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        cli.main()
    except SystemExit as error:
        return str(error.code) if error.code not in (None, 0) else None
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return None


def check_output(case: Case, model: Path, output: Path) -> Outcome:
    """What was written loads, tells no secret, and after a conversion has the dense model's logits."""
    for file in output.rglob("*"):
        if file.is_file() and SECRET.encode() in file.read_bytes():
            return Outcome("wrong result", f"{file} has what lies outside the folder")
    if not (output / "config.json").is_file():  # no model, but figures of one
        return Outcome("done")
    input_ids = torch.randint(3, 8, (1, 12), generator=torch.Generator().manual_seed(0))

    def logits(folder: Path) -> torch.Tensor:
        with torch.no_grad():
            # which code computes the attention is no part of the model
            loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="sdpa")
            loaded.config.return_dict = True
            return loaded.eval()(input_ids).logits

    try:
        if (output / "tokenizer_config.json").is_file():
            AutoTokenizer.from_pretrained(output)
        made = logits(output)
    except Exception as error:
        return Outcome("wrong result", f"exit 0, and it does not load: {type(error).__name__}: {error}")
    if case.command[0] != "convert":
        return Outcome("done")
    try:
        dense = logits(model)
    except Exception as error:
        return Outcome(
            "wrong result", f"exit 0, though the dense model does not load: {type(error).__name__}: {error}"
        )
    if "exact" in case.command and not torch.equal(made.nan_to_num(7.0), dense.nan_to_num(7.0)):
        return Outcome("wrong result", f"logits differ by {(made - dense).abs().max()}")
    near = dense.dtype == torch.float32 and (largest := dense.abs().max().item()) < 1e3  # else it may overflow
    if "anchored" in case.command and near and not torch.allclose(made, dense, atol=1e-3 * largest):
        return Outcome("wrong result", f"logits differ by {(made - dense).abs().max()}")
    return Outcome("done")


class Tracebacks(logging.Handler):
    """Collects the tracebacks that are logged."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[0]:
            self.found.append("".join(traceback.format_exception(*record.exc_info)))

    def __enter__(self):
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *_):
        logging.getLogger().removeHandler(self)


@contextmanager
def limits():
    """Of time and memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, hard))
    try:
        with deadline(SECONDS):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


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
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        yield said


@contextmanager
def inside(folder: Path):
    here = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)
