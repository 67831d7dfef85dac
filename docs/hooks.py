"""What mkdocs.yml cannot say: where the modules of the package lie, and what the site shows from outside docs/."""

import configparser
import re
import shutil
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files


ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ROOT / "build" / "docs"
PICTURES = "benchmarks/results"
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
NO_PAGES = ("CITATION.cff",)


@event_priority(100)  # before mkdocstrings looks for the folder
def on_config(config: MkDocsConfig) -> None:
    """
    Copy the modules to the folders that their packages' names say, as an installation does: griffe, which reads the
    docstrings, goes by folders, and `package_dir` in setup.cfg maps them.
    """
    shutil.rmtree(PACKAGES, ignore_errors=True)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    for line in setup["options"]["package_dir"].strip().split("\n"):
        package, folder = (part.strip() for part in line.split("="))
        for file in (ROOT / folder).rglob("*.py"):
            copy = PACKAGES.joinpath(*package.split("."), file.relative_to(ROOT / folder))
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(_plain_markdown(file.read_text(encoding="utf-8")), encoding="utf-8")


def on_files(files: Files, config: MkDocsConfig) -> None:
    """README.md is the first page; the benchmarks' pictures lie where the pages of docs/ see them."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=_links((ROOT / source).read_text(encoding="utf-8"))))
    for picture in sorted((ROOT / PICTURES).glob("*.png")):
        name = f"{PICTURES}/{picture.name}"
        files.append(File.generated(config, name, abs_src_path=str(picture)))


def on_page_markdown(markdown: str, **_) -> str:
    """A page of docs/ names the pictures as they lie in the repository."""
    return markdown.replace(f"](../{PICTURES}/", f"]({PICTURES}/")


def _plain_markdown(source: str) -> str:
    """Of docstrings as transformers writes them: [`Name`] for a link, (`int`, *optional*) for a type."""
    source = re.sub(r"\[(`[\w.]+`)\](?![\[(])", r"\1", source)
    return re.sub(r"^ +[\w, ]+ \(`.*\):$", lambda line: re.sub("[`*]", "", line[0]), source, flags=re.MULTILINE)


def _links(markdown: str) -> str:
    """Of a file in the repository's root, as they are from docs/."""
    markdown = markdown.replace("](docs/", "](")
    for page, source in PAGES.items():
        markdown = markdown.replace(f"]({source})", f"]({page})")
    for name in NO_PAGES:
        markdown = markdown.replace(f"[{name}]({name})", f"`{name}`")
    return markdown
