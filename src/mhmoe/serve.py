"""`mhmoe serve`: `transformers serve`, which then knows MH-MoE and its experts backend without remote code."""

from transformers.cli.transformers import app

import mhmoe  # noqa: F401, which registers the models
from mhmoe.errors import UserError, one_line


def main(arguments: list[str]) -> None:
    """All arguments are those of `transformers serve`; UserError if it cannot start with them."""
    try:
        app(["serve", *arguments], prog_name="mhmoe")
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"serve: {one_line(error)}") from error
