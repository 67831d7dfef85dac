"""Names and commands of users in Markdown, where no character of theirs may mean something."""

import re


def one_line(text: str) -> str:
    """`text` with line breaks and other invisible characters as their escapes."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def plain(text: str) -> str:
    """`text` among words."""
    return re.sub(r"([\\`*_\[\]<>#|~&$!])", r"\\\1", one_line(text))


def code(text: str) -> str:
    """`text` as code among words."""
    inner = one_line(text)
    fence = "`" * (_longest_run(inner) + 1)
    space = " " if inner.startswith("`") or inner.endswith("`") else ""
    return f"{fence}{space}{inner}{space}{fence}"


def block(text: str) -> str:
    """Lines of code."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
