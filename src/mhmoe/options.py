"""Command-line options: flags from dataclass fields, each accepted with dashes and with underscores."""

import argparse
import dataclasses
import shlex
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NoReturn

from .errors import UserError


def in_either_spelling(parser: argparse.ArgumentParser, arguments: Iterable[str]) -> list[str]:
    """
    `arguments` with every flag of `parser` as the parser spells it: `--num_experts 8` becomes `--num-experts 8` where
    the parser knows that, and the other way round. Values, and all that follows `--`, stay as they are.
    """
    flags = [flag for flag in parser._option_string_actions if flag.startswith("--")]
    respelt, rest = [], list(arguments)
    while rest and rest[0] != "--":
        flag, *value = rest.pop(0).split("=", 1)
        if flag.startswith("--") and flag not in flags:
            flag = _spelt_as_in(flags, flag, parser.allow_abbrev)
        respelt.append("=".join([flag, *value]))
    return respelt + rest


def _spelt_as_in(flags: list[str], flag: str, allow_abbrev: bool) -> str:
    def plain(name: str) -> str:
        return name.replace("-", "_")

    if same := [known for known in flags if plain(known) == plain(flag)]:
        return same[0]
    if allow_abbrev and (longer := [known for known in flags if plain(known).startswith(plain(flag))]):
        return longer[0][: len(flag)]  # argparse completes it, or says that it is ambiguous
    return flag


class OptionParser(argparse.ArgumentParser):
    """
    Takes flags in either spelling (see the module), and raises a [`UserError`] for a mistake. Another class of parsers
    may stand after it as a base.
    """

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        arguments = sys.argv[1:] if args is None else args
        return super().parse_known_args(in_either_spelling(self, arguments), namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def option(
    default: Any,
    help: str | Callable[[], str],
    metavar: str | None = None,
    choices: Collection[str] | None = None,
    repeated: bool = False,
    **metadata: Any,
) -> Any:
    """
    A field of a dataclass of options, from which [`add_options`] makes a flag.

    Args:
        default: where the flag is not given.
        help: of the flag, in which %(default)s stands for the default; a function is called when the help is wanted.
        metavar: of the flag's value.
        choices: the values that are allowed, looked up when the flag is read.
        repeated: whether the flag may be given several times; the field then holds a list of the values.
        metadata: for the dataclass's own use.
    """
    described = {"help": help, "metavar": metavar, "choices": choices, "repeated": repeated, **metadata}
    return dataclasses.field(default=default, metadata=described)


def flag(name: str) -> str:
    """The flag of the field `name`: `--num-experts` of `num_experts`."""
    return "--" + name.replace("_", "-")


def as_flags(options: Any, names: Collection[str] | None = None) -> list[str]:
    """
    The words of a command line that gives the dataclass `options` its values, or those in `names`, in that order.
    `None` and a switch in its usual position need no word.
    """
    fields = {field.name: field for field in dataclasses.fields(options) if "help" in field.metadata}
    words = []
    for name in fields if names is None else names:
        value = getattr(options, name)
        if isinstance(value, bool):
            words += [] if value == fields[name].default else [flag(name if value else f"no_{name}")]
        elif value is not None:
            values = value if isinstance(value, (list, tuple)) else [value]
            words += [word for each in values for word in (flag(name), str(each))]
    return words


def command_line(words: Sequence[str]) -> str:
    """`words` as one line that a shell reads as they are; a line break in a word becomes an escape."""
    return " ".join(shlex.quote(word) if word.isprintable() else _escaped(word) for word in words)


def _escaped(word: str) -> str:
    kept = word.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in kept) + "'"


def add_options(parser: argparse._ActionsContainer, options: type[Any], names: Collection[str] | None = None) -> None:
    """
    Add a flag for every field of the dataclass `options` that was made by [`option`], or for those in `names`. A flag
    that is not given does not appear in the namespace, so that the dataclass's default holds.
    """
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        if "help" not in field.metadata or (names is not None and field.name not in names):
            continue
        described = field.metadata["help"]
        help_text = (described() if callable(described) else described).replace("%(default)s", str(field.default))
        details: dict[str, Any] = {"help": help_text, "default": argparse.SUPPRESS}
        kind = _value_type(hints[field.name])
        if kind is not bool:
            details |= {"type": kind, "metavar": field.metadata["metavar"], "choices": field.metadata["choices"]}
            details |= {"action": "append"} if field.metadata["repeated"] else {}
        elif field.default:
            details["action"] = argparse.BooleanOptionalAction
        else:
            details["action"] = "store_true"
        parser.add_argument(flag(field.name), **details)


def _value_type(hint: Any) -> type:
    """The type that a flag's value is read as: of `int | None`, `int`; of `str | Path`, `str`."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):  # of which the second is Literal[...] | None
        kinds = [_value_type(kind) for kind in typing.get_args(hint) if kind is not type(None)]
        return str if str in kinds else kinds[0]
    return str if typing.get_origin(hint) is typing.Literal else hint
