"""How a user's mistake travels from where it is found to the command line."""

import argparse
from typing import NoReturn


class UserError(ValueError):
    """A mistake that the user can mend. The message is one line: the field or file, its value, and what to do."""


def raise_on_usage_error(parser: argparse.ArgumentParser) -> None:
    """Make `parser` raise [`UserError`] where argparse would print its whole usage and exit."""

    def error(message: str) -> NoReturn:
        raise UserError(f"{message}; see {parser.prog} --help")

    parser.error = error


def printable(text: str) -> str:
    """`text` with line breaks and other invisible characters as their escapes."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def one_line(error: BaseException) -> str:
    """The message of another library's exception, for use inside one line of ours."""
    return " ".join(str(error).split()) or type(error).__name__
