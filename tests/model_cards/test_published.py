"""What is written beside the weights: it says no more than it should, and nothing of the source can break it."""

import json
import os
import shutil

import pytest
from commands import assert_one_line, run
from huggingface_hub import ModelCard
from tiny import save_dense

from mhmoe.conversion import convert, verify
from mhmoe.errors import UserError
from mhmoe.model_cards import markdown, sections


SMALL = {"num_moe_heads": 4, "num_experts": 6, "moe_intermediate_size": 8}
BROKEN_CARDS = {
    "tab": b"---\ntags:\n\t- a\n---\n# Tiny\n",
    "two colons": b"---\nlicense: apache: 2\n---\n",
    "undefined alias": b"---\nlicense: *mit\n---\n",
    "deep": b"---\nlicense: " + b"[" * 2000 + b"\n---\n",
    "a list": b"---\n- license\n---\n",
    "an unknown tag": b"---\nlicense: !!python/object:os.system {}\n---\n",
    "not UTF-8": b"---\nlicense: caf\xe9\n---\n",
}
ODD_CARDS = {
    "no metadata": b"# Tiny\n",
    "empty": b"",
    "results that are none": b"---\nmodel-index: 7\n---\n",
    "odd values": b"---\nlicense: 2024-01-01\nlanguage: {a: [b]}\nlicense_link: .nan\n---\n",
}


@pytest.fixture
def dense(tmp_path):
    return save_dense(tmp_path / "dense")


@pytest.mark.parametrize("case", [*BROKEN_CARDS, *ODD_CARDS])
def test_a_card_that_cannot_be_read_costs_the_card_alone(tmp_path, dense, case, capsys):
    (dense / "README.md").write_bytes({**BROKEN_CARDS, **ODD_CARDS}[case])
    capsys.readouterr()
    output = convert(dense, tmp_path / "out", base_model="a/b", **SMALL)
    said = [line for line in capsys.readouterr().out.splitlines() if "README.md" in line]
    assert len(said) == (case in BROKEN_CARDS), said
    metadata = ModelCard.load(output / "README.md").data.to_dict()
    assert metadata["base_model"] == "a/b"
    assert not {"license", "language", "license_link"} & metadata.keys()
    assert verify(dense, output, max_tokens=64).broken_promises == []


def test_a_readme_that_is_a_folder(tmp_path, dense):
    (dense / "README.md").unlink()
    (dense / "README.md").mkdir()
    assert (convert(dense, tmp_path / "out", **SMALL) / "README.md").is_file()


def test_languages_with_norwegian(tmp_path, dense):
    (dense / "README.md").write_text("---\nlicense: mit\nlanguage: [no, en]\n---\n")
    output = convert(dense, tmp_path / "out", **SMALL)
    assert ModelCard.load(output / "README.md").data.language == ["no", "en"]


def test_licences_in_folders_and_links(tmp_path, dense):
    (dense / "LICENSES").mkdir()
    (dense / "LICENSES" / "MIT.txt").write_text("as you like")
    (dense / "LICENSES" / "again").symlink_to("..")
    (dense / "LICENSE-gone").symlink_to(dense / "nowhere")
    (dense / "LICENSE-of-another").symlink_to(dense / "LICENSE")
    os.mkfifo(dense / "NOTICE")
    output = convert(dense, tmp_path / "out", **SMALL)
    assert {path.name for path in output.glob("LICENSE*")} == {"LICENSE", "LICENSE-of-another", "LICENSES"}
    assert [path.name for path in (output / "LICENSES").rglob("*")] == ["MIT.txt"]
    assert not any(path.is_symlink() for path in output.iterdir())
    assert not (output / "NOTICE").exists()


def test_what_cannot_be_copied_is_noticed_before_the_weights(tmp_path, dense, monkeypatch):
    def unreadable(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.read_bytes", unreadable)
    monkeypatch.setattr("mhmoe.conversion.writer._write_shard", lambda *_: pytest.fail("weights were written"))
    with pytest.raises(UserError, match=r"dense/LICENSE: cannot be read \(Permission denied\)"):
        convert(dense, tmp_path / "out", **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_no_path_is_published(tmp_path, dense):
    text = tmp_path / "text.txt"
    text.write_text("What was read is named, where it lay is not. " * 40)
    options = {"calibration": text, "calibration_tokens": 900, "router_init": "kmeans"}
    output = convert(dense, tmp_path / "new" / "out", **SMALL, **options)
    for name in ("README.md", "conversion.json", "config.json", "generation_config.json"):
        assert str(tmp_path) not in (output / name).read_text(), name
    command = json.loads((output / "conversion.json").read_text())["command"]
    assert command.startswith("mhmoe convert dense out --strategy exact ")
    assert "--calibration text.txt " in command


@pytest.mark.parametrize(
    "name", ["a *b* _c_", "<script>", "`tick`", "line\nbreak", "[link](x)", "# head", "{{ braces }}", "a|b"]
)
def test_names_mean_nothing_in_markdown(tmp_path, dense, name):
    source = shutil.move(dense, tmp_path / name)
    output = convert(source, tmp_path / f"{name} out", **SMALL)
    card = ModelCard.load(output / "README.md")
    title = next(line for line in card.text.splitlines() if line.startswith("# "))
    assert title == f"# {markdown.plain(name)}-mhmoe"
    assert f"\n{markdown.code(name)}, upcycled into MH-MoE" in card.text
    assert card.text.count("\n# ") == 1
    assert "Not trained after conversion" in sections.find(card.text, "status")


@pytest.mark.parametrize(
    ("text", "plain", "code"),
    [
        ("word", "word", "`word`"),
        ("a_b*c", r"a\_b\*c", "`a_b*c`"),
        ("a`b``c", r"a\`b\`\`c", "```a`b``c```"),
        ("`", r"\`", "`` ` ``"),
        ("a\nb", r"a\\nb", r"`a\nb`"),
        ("<!-- x -->", r"\<\!-- x --\>", "`<!-- x -->`"),
    ],
)
def test_markdown(text, plain, code):
    assert (markdown.plain(text), markdown.code(text)) == (plain, code)
    assert markdown.block(f"{text} ``` x").startswith("````\n")


@pytest.mark.parametrize("command", [("plan",), ("convert", "out"), ("verify", "out")], ids=str)
def test_an_adapter_beside_the_weights(tmp_path, dense, command, capsys, monkeypatch):
    if command[0] == "verify":
        convert(dense, tmp_path / "out", **SMALL)
    (dense / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    before = {path.name for path in tmp_path.iterdir()}
    outputs = [tmp_path / name for name in command[1:]]
    capsys.readouterr()
    status, errors = run(capsys, monkeypatch, command[0], dense, *outputs)
    assert_one_line(status, errors, "adapter_config.json: an adapter; merge it first")
    assert {path.name for path in tmp_path.iterdir()} == before


def test_an_adapter_beside_the_converted_weights(tmp_path, dense):
    output = convert(dense, tmp_path / "out", **SMALL)
    (output / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match="merge it first"):
        verify(dense, output)
