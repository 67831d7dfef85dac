"""Every code block of the pages about other tools runs; see tests/docs/test_docs.py for the other pages."""

import pytest
from pages import NEEDS, run_page


@pytest.mark.parametrize("page", NEEDS)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    for module in NEEDS[page]:
        pytest.importorskip(module)
    run_page(page, tmp_path, monkeypatch)
