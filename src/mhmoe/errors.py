"""How a user's mistake travels from where it is found to the command line."""

import math


# characters of a value in a message: as many as tell it from others
SHOWN = 60


class UserError(ValueError):
    """A mistake that the user can mend. The message is one line: the field or file, its value, and what to do."""


class WriteError(UserError):
    """
    A file that could not be written, most often since the disk is full: no mistake in what was asked for.

    Args:
        what: the file, and why.
        way_out: how to go on.
    """

    def __init__(self, what: str, way_out: str):
        super().__init__(f"{what}; {way_out}")
        self.what = what


def printable(text: str) -> str:
    """`text` with line breaks and other invisible characters as their escapes."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def one_line(value: object, most: float | None = None) -> str:
    """
    A value as one line, or what another library's exception says, for use inside a line of ours.

    Args:
        most: characters, of which the rest is cut; by default 60 of a value and all of an exception.
    """
    is_error = isinstance(value, BaseException)
    line = " ".join((str(value) if is_error else repr(value)).split()) or type(value).__name__
    most = most or (math.inf if is_error else SHOWN)
    return line if len(line) <= most else f"{line[: int(most)]}..."
