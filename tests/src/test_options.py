"""Flags from dataclass fields, in either spelling."""

import argparse
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from transformers import HfArgumentParser

from mhmoe.errors import UserError
from mhmoe.options import OptionParser, add_options, as_flags, command_line, in_either_spelling, option


COLOURS = {"red": 1}


def told_late() -> str:
    return f"one of {', '.join(COLOURS)}"


@dataclass
class Sizes:
    num_experts: int | None = option(None, "how many (default: %(default)s)", "E")
    text_file: str | Path | None = option(None, told_late)
    use_it: bool = option(False, "whether")
    keep_it: bool = option(True, "whether not")
    of_colour: Literal["red", "blue"] = option("red", "one of some", choices=COLOURS)
    of_some: Literal["a", "b"] | None = option(None, "one or none", choices=("a", "b"))
    file: str | Path | Sequence[str] | None = option(None, "one or several", repeated=True)
    hidden: int = 3


@pytest.fixture
def parser():
    parser = OptionParser("mhmoe test", argument_default=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*")
    add_options(parser, Sizes)
    return parser


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", {}),
        ("--num-experts 4 --use-it", {"num_experts": 4, "use_it": True}),
        ("--num_experts 4 --use_it", {"num_experts": 4, "use_it": True}),
        ("--num_experts=4 --keep_it", {"num_experts": 4, "keep_it": True}),
        ("--no-keep-it", {"keep_it": False}),
        ("--no_keep_it", {"keep_it": False}),
        ("--of_some b", {"of_some": "b"}),
        ("--num_exp 4 --num-exp 5", {"num_experts": 5}),
        ("--text_file a_b-c.txt", {"text_file": "a_b-c.txt"}),
        ("--text_file=a_b-c.txt", {"text_file": "a_b-c.txt"}),
        ("--file a word --file=b", {"file": ["a", "b"]}),
    ],
)
def test_either_spelling(parser, arguments, expected):
    given = vars(parser.parse_args(arguments.split()))
    given.pop("words", None)
    assert given == expected


def test_values_stay_as_they_are(parser):
    arguments = ["--text-file", "num_experts", "--", "--num_experts"]
    assert in_either_spelling(parser, arguments) == arguments
    assert parser.parse_args(arguments).words == ["--num_experts"]


@pytest.mark.parametrize("arguments", ["--num_experts many", "--nope_nope 1", "--of_colour green", "--num_experts"])
def test_a_mistake_is_one_line(parser, arguments):
    with pytest.raises(UserError, match=r"see mhmoe test --help") as refused:
        parser.parse_args(arguments.split())
    assert "\n" not in str(refused.value)


def test_flags_give_the_values_again(parser):
    for options in (
        Sizes(),
        Sizes(file=["a b", "c"]),
        Sizes(num_experts=3, text_file=Path("a b"), use_it=True, keep_it=False),
    ):
        given = vars(parser.parse_args(as_flags(options)))
        given.pop("words", None)
        again = Sizes(**given)
        assert (str(again.text_file), again.num_experts) == (str(options.text_file), options.num_experts)
        assert again.file == options.file
        assert (again.use_it, again.keep_it, again.of_colour) == (options.use_it, options.keep_it, "red")
    assert as_flags(options, ["keep_it", "num_experts"]) == ["--no-keep-it", "--num-experts", "3"]


def test_help_and_choices_are_of_the_moment(monkeypatch):
    monkeypatch.setitem(COLOURS, "green", 2)
    parser = OptionParser("mhmoe test")
    add_options(parser, Sizes, names={"of_colour", "text_file"})
    assert "one of red, green" in parser.format_help()
    assert "--num-experts" not in parser.format_help()
    add_options(parser, Sizes, names={"num_experts"})
    assert "how many (default: None)" in parser.format_help()
    assert parser.parse_args(["--of_colour", "green"]).of_colour == "green"


def test_a_parser_of_transformers():
    @dataclass
    class Arguments:
        block_size: int = 1
        with_text: bool = True

    class Parser(OptionParser, HfArgumentParser):
        pass

    parser = Parser([Arguments], allow_abbrev=False)
    for spelling in ("--block-size=2 --no-with-text", "--block_size 2 --no_with_text"):
        (parsed,) = parser.parse_args_into_dataclasses(spelling.split())
        assert (parsed.block_size, parsed.with_text) == (2, False)


def test_a_parser_that_spells_with_underscores():
    parser = OptionParser("mhmoe test", allow_abbrev=False)
    parser.add_argument("--batch_size", type=int)
    assert parser.parse_args(["--batch-size", "3"]).batch_size == 3
    with pytest.raises(UserError, match="--batch-si"):
        parser.parse_args(["--batch-si", "3"])


@pytest.mark.parametrize("word", ["plain", "two words", "it's", "line\nbreak", "tab\tand 'quote' and \\", "ärger"])
def test_a_command_is_one_line_that_a_shell_reads_again(word):
    line = command_line(["printf", "%s", word])
    assert "\n" not in line
    assert subprocess.run(["bash", "-c", line], capture_output=True, text=True).stdout == word
