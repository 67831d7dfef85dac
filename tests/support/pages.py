"""The code blocks of README.md and docs/, run as a reader would: from top to bottom, in an empty folder."""

import argparse
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import click
import datasets
import pytest
import torch
import torch.distributed.run
import yaml
from accelerate.commands.launch import launch_command_parser
from paths import ROOT
from tiny import save_dense

from mhmoe import cli
from mhmoe.conversion import STRATEGIES


# What a page needs beside the package: such pages run in tests/ecosystem.
NEEDS = {
    "docs/peft.md": ("peft",),
    "docs/quantization.md": ("torchao", "bitsandbytes"),
    "docs/serve.md": ("fastapi", "uvicorn"),
    "docs/trl.md": ("trl", "peft"),
}
# All that a reader does not see: where a page names a model on the Hub, or fetches it, there is a tiny one.
ACCELERATE = ("accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0")
ON_THE_HUB = ("HuggingFaceTB/SmolLM2-135M-Instruct",)
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>.+?) -->\s*)?^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^ *```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """
    A fenced block of a page.

    Attributes:
        line: where it starts.
        reason: why it is not run, from a comment `<!-- not run: REASON -->` before it; it is parsed all the same.
    """

    line: int
    language: str
    text: str
    reason: str | None


def pages() -> list[str]:
    return ["README.md", *sorted(file.relative_to(ROOT).as_posix() for file in (ROOT / "docs").rglob("*.md"))]


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("text")) + 1
        lines = [row.removeprefix(match["indent"]) for row in match["text"].splitlines()]
        found.append(Block(line, match["language"], "\n".join(lines) + "\n", match["reason"]))
    assert text.count("```") == 2 * len(found), f"{page}: a fence is not closed"
    return found


def run_page(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of a page, in `folder`; the first that fails ends it."""
    monkeypatch.chdir(folder)
    text = (ROOT / page).read_text(encoding="utf-8")
    for name in ON_THE_HUB:
        if name in text:
            save_dense(folder / name)
    if page == "docs/scale.md":
        (folder / "examples").symlink_to(ROOT / "examples")
        for block in blocks("docs/train.md")[:2]:  # the text and the model that it takes
            run_block(block, page, {}, monkeypatch)
    namespace = {"__name__": "__main__"}
    with patch.dict(STRATEGIES):  # a page may register its own
        for block in blocks(page):
            torch.manual_seed(0)
            run_block(block, page, namespace, monkeypatch)


def run_block(block: Block, page: str, namespace: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    match block.language:
        case "python":
            # the empty lines give a traceback the page's line numbers
            code = compile("\n" * (block.line - 1) + block.text, page, "exec")
            if block.reason is None:
                exec(code, namespace)
        case "bash":
            for words in commands(block.text):
                run_command(words, block.reason is None, f"{page}, line {block.line}", monkeypatch)
        case "json":
            json.loads(block.text)
        case "yaml":
            yaml.safe_load(block.text)
        case "" | "text":  # what something printed
            assert not re.search(r"^(mhmoe|pip|python|import|from) ", block.text, re.MULTILINE), (
                f"{page}, line {block.line}: say which language this block is in"
            )
        case _:
            pytest.fail(f"{page}, line {block.line}: no test knows language {block.language!r}", pytrace=False)


def commands(text: str) -> list[list[str]]:
    """The words of each command in a shell block."""
    found, begun = [], ""
    for line in text.replace("\\\n", " ").splitlines():
        begun += f"{line}\n"
        try:
            words = shlex.split(begun, comments=True)
        except ValueError:  # a quotation goes on in the next line
            continue
        found += [words] if words else []
        begun = ""
    assert not begun, f"a quotation is not closed: {begun}"
    return found


def run_command(words: list[str], run: bool, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run what is ours, parse what is others'; what cannot be parsed here must not be in a page."""
    run = run and not any("path/to/" in word for word in words)  # a place of the reader's
    while re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    match words:
        case ["mhmoe", "serve", *_]:  # it never ends, and its options are the next one's
            assert "serve" in cli.COMMANDS, f"{where}: mhmoe has no command 'serve'"
            parse_others("transformers.cli.transformers", words[1:], where)
        case ["mhmoe", *arguments]:
            parse_mhmoe(arguments, where)
            if run:
                run_mhmoe(arguments, where, monkeypatch)
        case ["accelerate" | "torchrun" as launcher, *arguments]:
            launched = parse_launch(launcher, arguments, where)
            if run and "docs/scale.md" in where:  # the other pages' take long on processors
                run_launch(launcher, launched, where)
        case ["make", *targets]:
            known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert set(targets) <= set(known), f"{where}: the Makefile has no {targets}"
        case ["python", "-m", "mhmoe", *arguments]:
            parse_mhmoe(arguments, where)
        case ["python", "examples/fetch_smollm2.py", folder]:
            if run:
                save_dense(Path(folder))
        case ["python", "-c", code]:
            compile(code, where, "exec")
        case ["python" | "bash", script, *arguments]:
            source = (ROOT / script).read_text()  # fails where there is none
            unknown = {word for word in arguments if word.startswith("--") and f'"{word}"' not in source}
            assert not unknown, f"{where}: {script} has no {unknown}"
        case ["hf", *arguments]:
            parse_others("huggingface_hub.cli.hf", arguments, where)
        case ["transformers", *arguments]:
            parse_others("transformers.cli.transformers", arguments, where)
        case ["pip", "install", *arguments]:
            for word in arguments:
                extra = re.search(r"\[(\w+)\]", word)
                assert not extra or f"\n{extra[1]} =\n" in (ROOT / "setup.cfg").read_text(), f"{where}: no {word}"
        case ["cd" | "git" | "curl" | "source" | "vllm", *_]:
            pass
        case _:
            pytest.fail(f"{where}: no test knows the command {words[0]!r}", pytrace=False)


def parse_launch(launcher: str, arguments: list[str], where: str) -> argparse.Namespace:
    """What several processes would run, `mhmoe` or an example."""
    if launcher == "torchrun":
        launched = torch.distributed.run.get_args_parser().parse_args(arguments)
    else:
        assert arguments[0] == "launch", f"{where}: no test knows accelerate {arguments[0]}"
        launched = launch_command_parser().parse_args(arguments[1:])
        assert launched.config_file is None or (ROOT / launched.config_file).is_file(), f"{where}: no config file"
    if launched.module:
        assert launched.training_script == "mhmoe", f"{where}: launch -m mhmoe"
        parse_mhmoe(launched.training_script_args, where)
    else:
        assert (ROOT / launched.training_script).is_file(), f"{where}: there is no {launched.training_script}"
    return launched


def run_launch(launcher: str, launched: argparse.Namespace, where: str) -> None:
    """On two processes of the CPU, however many GPUs and nodes it is written for."""
    words = [str(ROOT / launched.training_script), *launched.training_script_args]
    if launched.module:
        words = ["-m", launched.training_script, *map(on_two, launched.training_script_args)]
    if launcher == "torchrun":
        command = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words]
    elif launched.config_file and "deepspeed" in launched.config_file:
        if importlib.util.find_spec("deepspeed") is None:
            return  # tests/ecosystem/test_deepspeed.py launches it
        command = [*ACCELERATE, "--config_file", launched.config_file, *words]
    else:
        given = ["--config_file", launched.config_file] if launched.config_file else ["--multi_gpu"]
        command = [*ACCELERATE, *given, str(ROOT / "tests/support/accelerate_on_cpus.py"), *words[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(datasets.config.HF_DATASETS_CACHE)}
    result = subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, text=True)
    if result.returncode:
        pytest.fail(f"{where}: {result.stderr[-3000:]}", pytrace=False)


def on_two(word: str) -> str:
    """A word of a command with the sizes of a `DistributedConfig`, or the file that they are in, for two processes."""
    if word.endswith(".json") and (ROOT / word).is_file():
        word = (ROOT / word).read_text()
    if not word.lstrip().startswith("{"):
        return word
    return json.dumps({name: 1 if name == "dp_replicate_size" else 2 for name in json.loads(word)})


def parse_mhmoe(arguments: list[str], where: str) -> None:
    """With the command's own parser; a flag that it does not know fails."""
    if arguments in (["--help"], ["--version"]):
        return
    name, *arguments = arguments
    assert name in cli.COMMANDS, f"{where}: mhmoe has no command {name!r}"
    module = importlib.import_module(cli.COMMANDS[name][0])
    try:
        _, others = module.parser().parse_known_args(arguments)
        if name == "compare":  # what it does not know is pretrain's
            pretrain = importlib.import_module(cli.COMMANDS["pretrain"][0])
            _, others = pretrain.parser().parse_known_args([*others, "--output_dir", "x"])
    except ValueError as error:
        pytest.fail(f"{where}: {error}", pytrace=False)
    assert not others, f"{where}: mhmoe {name} does not know {' '.join(others)}"


def run_mhmoe(arguments: list[str], where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mhmoe", *arguments])
    error = None
    try:
        cli.main()
    except SystemExit as stop:
        error = stop.code
    if error:
        pytest.fail(f"{where}: {error}", pytrace=False)


def parse_others(module: str, arguments: list[str], where: str) -> None:
    """Another project's command: asked for help with these arguments, it refuses those that it does not know."""
    command = importlib.import_module(module).app
    with redirect_stdout(io.StringIO()):
        try:
            command([*arguments, "--help"], standalone_mode=False)
        except click.ClickException as error:
            pytest.fail(f"{where}: {error.format_message()}".splitlines()[0], pytrace=False)
