"""Sections of a model card, which are found by their marks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe.model_cards import sections


CARD = "---\nlicense: mit\n---\n# Model\n\nWords.\n"


def test_a_section_is_added_at_the_end_and_replaced_where_it_stands():
    card = sections.replace(CARD, "training", "## Training\n\nold\n")
    assert card == f"{CARD}\n<!-- mhmoe: training -->\n## Training\n\nold\n<!-- end of training -->\n"
    card += "\n## Last\n\nend\n"
    new = sections.replace(card, "training", "## Trained differently\n\n## with headings\n\nnew")
    assert sections.find(new, "training") == "## Trained differently\n\n## with headings\n\nnew"
    assert "old" not in new
    assert new.startswith(CARD)
    assert new.endswith("<!-- end of training -->\n\n## Last\n\nend\n")
    assert sections.replace(new, "training", "## Training\n\nold") == card


def test_others_stay_as_they_are():
    card = sections.replace(sections.replace(CARD, "a", "first"), "b", "second")
    card = sections.replace(card, "a", r"third \1 $0")
    assert (sections.find(card, "a"), sections.find(card, "b")) == (r"third \1 $0", "second")
    assert sections.find(card, "c") is None


@pytest.mark.parametrize("end", ["", "## Last\n\nend\n", "<!-- mhmoe: b -->\nb\n<!-- end of b -->\n"])
def test_a_card_without_marks_has_sections_by_their_headings(end):
    card = sections.replace(f"# Model\n\n## Verified\n\nold\n\n### More\n\n{end}", "verified", "## Verified\n\nnew")
    assert card.count("## Verified") == 1
    assert "old" not in card
    assert "More" not in card
    assert card.startswith("# Model\n\n<!-- mhmoe: verified -->\n## Verified\n\nnew\n<!-- end of verified -->\n")
    assert card.endswith(end)
    assert sections.replace(card, "verified", "## Verified\n\nnew") == card


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("lines", [["# Model  "], ["# Model", "words \u2028", "", ""]])
def test_a_card_on_disk_keeps_its_line_ends(tmp_path, lines, line_end):
    card = tmp_path / "README.md"
    card.write_bytes(line_end.join(lines).encode())
    sections.replace_in_file(card, "training", "## Training\n\nwords")
    end = line_end if len(lines) > 1 else "\n"  # one line says nothing of it
    added = ["", "<!-- mhmoe: training -->", "## Training", "", "words", "<!-- end of training -->", ""]
    assert card.read_bytes().decode() == end.join([*[line for line in lines if line], *added])


NAMES = st.sampled_from(["training", "verified", "status"])
LINES = st.lists(st.sampled_from(["", "words", "## Training", "# Title", "---", "- a", "```", r"\1 $0 {{ x }}"])).map(
    "\n".join
)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(LINES, NAMES, LINES, NAMES, LINES)
def test_any_edit_is_idempotent_and_keeps_all_else(card, first, body, second, other):
    once = sections.replace(card, first, body)
    assert sections.find(once, first) == body.strip()
    assert sections.replace(once, first, body) == once
    twice = sections.replace(once, second, other)
    assert sections.find(twice, second) == other.strip()
    if first != second:
        assert sections.find(twice, first) == body.strip()
