"""
The help of every command, as files in golden/help; `make golden` writes them anew. Only what this package says is
compared: the flags of Trainer and of lm-eval change with their versions.
"""

import argparse
import dataclasses
import importlib
import sys
from pathlib import Path

import pytest
from lm_eval._cli.run import Run
from transformers import TrainingArguments

from mhmoe import cli
from mhmoe.options import OptionParser


GOLDEN = Path(__file__).parent / "golden" / "help"
# the options of `mhmoe serve` are those of `transformers serve`
COMMANDS = [command for command in cli.COMMANDS if command != "serve"]


def parser_of(command: str) -> argparse.ArgumentParser:
    return importlib.import_module(cli.COMMANDS[command][0]).parser()


def others(command: str) -> set[str]:
    """The flags of a command that are another library's."""
    if command == "eval":
        subparsers = argparse.ArgumentParser().add_subparsers()
        Run.create(subparsers)
        return {action.dest for action in subparsers.choices["run"]._actions} - {"help"}
    if command in ("train", "pretrain"):
        return {field.name for field in dataclasses.fields(TrainingArguments)}
    return set()


def invocation(formatter: argparse.HelpFormatter, action: argparse.Action) -> str:
    default = (action.dest.upper() if action.option_strings else action.dest) if action.choices is None else None
    value = formatter._format_args(action, default) if action.nargs != 0 else ""
    return f"{', '.join(action.option_strings)} {value}".strip()


def own_help(command: str) -> str:
    """What `--help` shows below its usage, without the flags of other libraries."""
    parser, foreign = parser_of(command), others(command)
    # Python 3.13 shows "-a, --all X" where others show "-a X, --all X"
    parser.formatter_class = type("Formatter", (parser.formatter_class,), {"_format_action_invocation": invocation})
    formatter = parser._get_formatter()
    formatter.add_text(parser.description)
    for group in parser._action_groups:
        formatter.start_section(group.title)
        formatter.add_text(group.description)
        formatter.add_arguments([action for action in group._group_actions if action.dest not in foreign])
        formatter.end_section()
    formatter.add_text(parser.epilog)
    return formatter.format_help()


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_is_the_golden_one(command, request, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = own_help(command) if command else cli.usage()
    file = GOLDEN / f"{command or 'mhmoe'}.txt"
    if request.config.getoption("--update-golden"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.rstrip() + "\n", encoding="utf-8")
    # where lines break is a matter of Python's version
    assert text.split() == file.read_text(encoding="utf-8").split(), "make golden"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_printed(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mhmoe", command, "--help"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: mhmoe {command}")
    for flag in parser_of(command)._option_string_actions:
        assert flag in printed or "--model" in flag  # of lm-eval, where the model is a word here


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_are_taken_in_either_spelling(command):
    parser = parser_of(command)
    for flag in [flag for flag in parser._option_string_actions if flag.startswith("--")]:
        for other in ("--" + flag[2:].replace("_", "-"), "--" + flag[2:].replace("-", "_")):
            assert other in parser._option_string_actions or isinstance(parser, OptionParser), other


@pytest.mark.parametrize(
    ("command", "arguments", "name", "value"),
    [
        ("params", ["--config-overrides", "hidden_size=96"], "config_overrides", "hidden_size=96"),
        ("eval", ["m", "--batch-size=4"], "batch_size", "4"),
        ("eval", ["m", "--update-card"], "update_card", True),
        ("routing", ["m", "--text", "a-b.txt", "--max-tokens", "7"], "max_tokens", 7),
        ("routing", ["m", "--text", "a", "--output-path", "x"], "output_path", Path("x")),
    ],
)
def test_dashes_reach_the_option(command, arguments, name, value):
    assert getattr(parser_of(command).parse_args(arguments), name) == value


def test_golden_files_are_those_of_the_commands():
    assert {file.stem for file in GOLDEN.iterdir()} == {"mhmoe", *COMMANDS}
