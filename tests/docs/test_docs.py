"""Every code block of README.md and docs/ runs; the pages about other tools run in tests/ecosystem."""

import json

import pytest
from pages import NEEDS, Block, pages, run_block, run_page
from paths import ROOT

from mhmoe.conversion import strategies


@pytest.mark.parametrize("page", [page for page in pages() if page not in NEEDS])
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    run_page(page, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("python", "import mhmoe\nmhmoe.NoSuchName\n"),
        ("bash", "mhmoe params --no_such_flag\n"),
        ("bash", "mhmoe no_such_command\n"),
        ("bash", "mhmoe convert nowhere somewhere\n"),
        ("bash", "mhmoe compare --models p2-dense --output_dir x --no_such_flag 1\n"),
        ("bash", "accelerate launch -m mhmoe train model --output_dir x --no_such_flag 1\n"),
        ("bash", "hf upload me/model folder --no-such-flag\n"),
        ("bash", "python benchmarks/experts.py --no_such_flag\n"),
        ("bash", "make no-such-target\n"),
        ("bash", "no-such-command\n"),
        ("json", "{no json}"),
        ("", "mhmoe params --paper 2\n"),
    ],
)
def test_a_block_that_is_wrong_fails(language, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((AssertionError, AttributeError, json.JSONDecodeError, pytest.fail.Exception)):
        run_block(Block(1, language, text, None), "page.md", {}, monkeypatch)


def test_the_strategies_are_those_of_the_registry():
    assert strategies.table() in (ROOT / "docs/convert.md").read_text(encoding="utf-8")
