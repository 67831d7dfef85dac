"""
Sections of a model card. Each stands between two HTML comments, which no reader of the card sees, so that a program
finds it whatever the words in it are:

    <!-- mhmoe: training -->
    ## Training
    ...
    <!-- end of training -->
"""

import re
from pathlib import Path

from mhmoe.files import write_text


ANY = re.compile(r"^<!-- mhmoe: ([^\n]*) -->\n.*?^<!-- end of \1 -->$", re.DOTALL | re.MULTILINE)


def section(name: str, body: str) -> str:
    """`body` as the section `name`."""
    return f"<!-- mhmoe: {name} -->\n{body.strip()}\n<!-- end of {name} -->"


def find(text: str, name: str) -> str | None:
    """The body of the section `name` of a card, `None` where there is none."""
    match = _marked(name).search(text)
    return match and match[1].strip()


def replace(text: str, name: str, body: str) -> str:
    """
    A card with `body` as its section `name`: in place of what that section holds, or else at the end.

    A card that was written before sections had marks has them by their headings: where `body` begins with a heading
    that such a card has, it takes the place of all from there to the next heading of that level.
    """
    new = section(name, body)
    match = _marked(name).search(text) or _by_heading(text, body.strip().partition("\n")[0])
    if match is None:
        return text.rstrip("\n") + f"\n\n{new}\n"
    before, after = text[: match.start()], text[match.end() :].lstrip("\n")
    return f"{before}{new}\n" + (f"\n{after}" if after else "")


def replace_in_file(file: Path, name: str, body: str) -> None:
    """The same in a card on disk, which is replaced at once, and keeps its kind of line ends."""
    text = file.read_bytes().decode("utf-8")
    if is_crlf := 0 < text.count("\r\n") == text.count("\n"):
        text = text.replace("\r\n", "\n")
    text = replace(text, name, body)
    write_text(file, text.replace("\n", "\r\n") if is_crlf else text)


def _marked(name: str) -> re.Pattern:
    escaped = re.escape(name)
    return re.compile(rf"^<!-- mhmoe: {escaped} -->\n(.*?)^<!-- end of {escaped} -->$", re.DOTALL | re.MULTILINE)


def _by_heading(text: str, heading: str) -> re.Match | None:
    if not heading.startswith("## "):
        return None
    named = re.finditer(rf"^{re.escape(heading)}\n.*?(?=^## |^<!-- mhmoe: |\Z)", text, re.DOTALL | re.MULTILINE)
    marked = [range(*match.span()) for match in ANY.finditer(text)]  # whose headings are theirs
    return next((match for match in named if not any(match.start() in section for section in marked)), None)
