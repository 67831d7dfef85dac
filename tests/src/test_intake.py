"""What comes in as a model folder and cannot be right: one line that names it, at once, and nothing written."""

import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
from tiny import save_dense, tiny_model

from mhmoe import cli
from mhmoe.errors import UserError
from mhmoe.intake import check_folder, own_files, read_json


SECONDS = 10
SMALL = ["--num-moe-heads", "2", "--num-experts", "4", "--moe-intermediate-size", "24"]


@pytest.fixture
def dense(tmp_path) -> Path:
    return save_dense(tmp_path / "dense", max_shard_size="60KB")


def refusal(*words: str | Path) -> str:
    """The one line that `mhmoe` ends with."""
    start = time.perf_counter()
    argv, sys.argv = sys.argv, ["mhmoe", *map(str, words)]
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = argv
    message = str(ended.value.code)
    assert message.startswith("mhmoe: error: ")
    assert "\n" not in message
    assert time.perf_counter() - start < SECONDS  # an upper bound that a hang crosses, not a speed
    return message


def edit_json(file: Path, **fields) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def raw_config(dense: Path, field: str, text: str) -> None:
    """A field whose text no JSON library of ours would write."""
    edit_json(dense / "config.json", **{field: "here"})
    file = dense / "config.json"
    file.write_text(file.read_text().replace('"here"', text))


CONFIGS = {
    ("num_hidden_layers", 1000): "num_hidden_layers=1000 is more than the 21 tensors",
    ("hidden_act", 1): "hidden_act=1",
    ("num_hidden_layers", 100_000): "num_hidden_layers=100000",
    ("num_hidden_layers", 10**7): "num_hidden_layers=10000000",
    ("hidden_size", 2**40): "hidden_size=1099511627776",
    ("vocab_size", 2**62): "vocab_size=4611686018427387904",
    ("pad_token_id", 128): "pad_token_id=128 must be below vocab_size=128",
    ("rope_theta", "10000"): "rope_theta='10000'",
    ("dtype", ()): r"dtype=\[\]",
    ("num_attention_heads", 1.5): r"num_attention_heads=1\.5",
    ("vocab_size", "x" * 5000): "vocab_size='x",
    ("auto_map", "evil"): "auto_map='evil'",
    ("use_cache", 2): "use_cache=2",
}


@pytest.mark.parametrize(("field", "value"), CONFIGS)
@pytest.mark.parametrize("command", ["convert", "plan"])
def test_config(tmp_path, dense, command, field, value):
    edit_json(dense / "config.json", **{field: value})
    words = [command, dense] + [tmp_path / "out"] * (command == "convert")
    message = refusal(*words)
    assert str(dense / "config.json") in message
    assert re.search(CONFIGS[field, value], message)
    assert len(message) < 600
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize("text", ["[" * 3000 + "]" * 3000, '{"a":' * 100 + "1" + "}" * 100, "9" * 6000], ids=len)
@pytest.mark.parametrize("command", ["convert", "plan"])
def test_json_that_is_too_deep_or_too_long(tmp_path, dense, command, text):
    raw_config(dense, "intermediate_size", text)
    assert "config.json" in refusal(command, dense, *[tmp_path / "out"] * (command == "convert"))


def linked(name: str, target: str):
    def edit(dense: Path) -> None:
        (dense / name).unlink(missing_ok=True)
        (dense / name).symlink_to(target)

    return edit


def config_alone(dense: Path) -> None:
    for file in dense.glob("model*"):
        file.unlink()
    edit_json(dense / "config.json", num_hidden_layers=10**7)


SHARD = "model-00001-of-00005.safetensors"
FOLDERS = {
    "dtype={'a': 1} must be a short name": lambda dense: edit_json(dense / "config.json", dtype={"a": 1}),
    "num_hidden_layers=10000000 must be": config_alone,
    f"{SHARD}: is a device": linked(SHARD, "/dev/zero"),
    "chat_template.json: links to /etc/passwd, outside the folder": linked("chat_template.json", "/etc/passwd"),
}


@pytest.mark.parametrize("named", FOLDERS)
@pytest.mark.parametrize("command", ["convert", "plan"])
def test_folder(tmp_path, dense, command, named):
    FOLDERS[named](dense)
    assert named in refusal(command, dense, *[tmp_path / "out"] * (command == "convert"))
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize("kind", ["fifo", "endless", "huge", "folder"])
def test_what_is_read_as_json_is_a_file_of_a_size(tmp_path, kind):
    file = tmp_path / "report.json"
    match kind:
        case "fifo":
            os.mkfifo(file)
        case "endless":
            file.symlink_to("/dev/zero")
        case "huge":
            file.touch()
            os.truncate(file, 2**36)
        case "folder":
            file.mkdir()
    with pytest.raises(UserError, match=r"report\.json: (is a|has)"):
        read_json(file)


INDEXES = [
    ({"weight_map": {}}, "weight_map={}"),
    ({}, "weight_map=None"),
    ({"metadata": None, "weight_map": {"lm_head.weight": "model.safetensors"}}, "metadata=None must be an object"),
    ({"weight_map": {"lm_head.weight": "/etc/passwd"}}, "'/etc/passwd'"),
    ({"weight_map": {"lm_head.weight": "../outside/x.safetensors"}}, "outside/x.safetensors"),
    ({"weight_map": {"lm_head.weight": "x" * 5000}}, "'xxx"),
    ({"weight_map": {"lm_head.weight": "a\nb.safetensors"}}, "b.safetensors"),
    ({"weight_map": {"lm_head.weight": ["a"]}}, r"['a']"),
]


@pytest.mark.parametrize(("index", "named"), INDEXES, ids=[named for _, named in INDEXES])
def test_index(tmp_path, dense, index, named):
    (dense / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, **index}))
    message = refusal("convert", dense, tmp_path / "out")
    assert "model.safetensors.index.json" in message
    assert named in message


@pytest.mark.parametrize("command", ["convert", "plan", "verify", "train", "routing", "eval"])
@pytest.mark.parametrize("kind", ["fifo", "endless", "folder", "outside", "nothing", "loop"])
def test_files_that_are_none_of_the_folder_s(tmp_path, kind, command):
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    file = folder / "config.json"
    file.unlink()
    match kind:
        case "fifo":
            os.mkfifo(file)
        case "folder":
            file.mkdir()
        case _:
            targets = {"endless": "/dev/zero", "outside": "/etc/passwd", "nothing": "nowhere", "loop": "config.json"}
            file.symlink_to(targets[kind])
    text = tmp_path / "text.txt"
    text.write_text("words " * 50)
    words = {
        "convert": [tmp_path / "out"],
        "plan": [],
        "verify": [folder],
        "train": ["--train_file", text, "--output_dir", tmp_path / "out"],
        "routing": ["--text", text],
        "eval": ["--tasks", "mhmoe_smoke"],
    }
    assert "config.json" in refusal(command, folder, *words[command])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_output_that_no_system_allows(tmp_path, dense, name):
    refusal("convert", dense, f"{tmp_path}/{name}", *SMALL)


@pytest.mark.parametrize("command", ["convert", "plan"])
def test_options_beyond_reason(tmp_path, dense, command):
    words = [command, dense, *[tmp_path / "out"] * (command == "convert")]
    assert f"num_experts={10**25}" in refusal(*words, "--num-experts", str(10**25))
    assert "revision='main'" in refusal(*words, "--revision", "main")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize("content", ["{", "[]", '{"version": "9"}', "\x00"])
def test_broken_tokenizer(tmp_path, dense, content):
    (dense / "tokenizer.json").write_text(content)
    assert "tokenizer" in refusal("convert", dense, tmp_path / "out", *SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_tokenizer_with_code_of_its_own_loses_it(tmp_path, dense, capsys, monkeypatch):
    edit_json(dense / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "repo--evil.Evil"]})
    monkeypatch.setattr(sys, "argv", ["mhmoe", "convert", str(dense), str(tmp_path / "out"), *SMALL])
    cli.main()
    assert "auto_map" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert "auto_map names code of its own, which is not copied" in capsys.readouterr().out


OWN_TOKENIZER = """
from transformers import PreTrainedTokenizer
from .own_words import WORDS

class OwnTokenizer(PreTrainedTokenizer):
    vocab_size = 128

    def get_vocab(self):
        return {chr(code): code for code in WORDS}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token) % 128

    def _convert_id_to_token(self, index):
        return chr(index)

    def save_vocabulary(self, *_, **__):
        return ()
"""
OWN_WORDS = """
import os
os.makedirs(os.environ["RAN"], exist_ok=True)
WORDS = range(3, 128)
"""


@pytest.fixture
def with_code(dense, tmp_path, monkeypatch) -> Path:
    """A dense model whose tokenizer cannot do without code of its own; the code makes the folder `ran`."""
    for file in dense.glob("*token*"):
        file.unlink()
    settings = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (dense / "tokenizer_config.json").write_text(json.dumps(settings))
    (dense / "own.py").write_text(OWN_TOKENIZER)
    (dense / "own_words.py").write_text(OWN_WORDS)
    monkeypatch.setenv("RAN", str(tmp_path / "ran"))
    return dense


def test_a_tokenizer_that_needs_code_is_refused_unless_it_is_trusted(tmp_path, with_code, monkeypatch):
    convert = ["convert", with_code, tmp_path / "out", *SMALL]
    assert "auto_map names code of its own, without which" in (message := refusal(*convert))
    assert "--trust-remote-code" in message
    assert not (tmp_path / "ran").exists()
    monkeypatch.setattr(sys, "argv", ["mhmoe", *map(str, convert), "--trust-remote-code"])
    cli.main()
    made = tmp_path / "out"
    assert (
        json.loads((made / "tokenizer_config.json").read_text())["auto_map"]["AutoTokenizer"][0] == "own.OwnTokenizer"
    )
    assert json.loads((made / "conversion.json").read_text())["tokenizer_code"] == ["own.py", "own_words.py"]
    assert (made / "own_words.py").read_text() == OWN_WORDS
    card = (made / "README.md").read_text()
    assert "**The tokenizer has code of its own**, copied from the source as it was: `own.py`, `own_words.py`." in card
    assert 'AutoTokenizer.from_pretrained("PATH_OR_ID", trust_remote_code=True)' in card
    assert "--trust-remote-code" in card
    monkeypatch.setattr(sys, "argv", ["mhmoe", "verify", str(with_code), str(made), "--trust-remote-code"])
    cli.main()


@pytest.mark.parametrize(
    ("module", "named"),
    [("../evil", "evil.Own"), ("repo--own", "repo--own"), ("routers", "routers.py"), ("nowhere", "nowhere.py")],
)
def test_code_that_is_not_copied_even_if_it_is_trusted(tmp_path, with_code, module, named):
    edit_json(with_code / "tokenizer_config.json", auto_map={"AutoTokenizer": [f"{module}.Own", None]})
    assert named in refusal("convert", with_code, tmp_path / "out", *SMALL, "--trust-remote-code")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{% for %}", "{{ cycler.__init__.__globals__.os.mkdir('ran') }}", "{{ messages.a.b }}"]
)
def test_chat_templates_are_in_a_sandbox_and_fail_in_one_line(tmp_path, dense, template, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (dense / "chat_template.jinja").write_text(template)
    words = ["--tasks", "mhmoe_smoke", "--limit", "1", "--device", "cpu", "--apply_chat_template"]
    assert "chat template" in refusal("eval", dense, *words)
    assert not (tmp_path / "ran").exists()


def test_only_the_folder_s_own_files_are_copied(tmp_path):
    outside, folder = tmp_path / "outside.txt", tmp_path / "model"
    outside.write_text("secret")
    folder.mkdir()
    for name in ("LICENSE", "LICENSE.env", "LICENSE.md", "NOTICE"):
        (folder / name).write_text("words")
    (folder / "LICENSE.txt").symlink_to(outside)
    (folder / "LICENSE-2").symlink_to("LICENSE")
    (folder / "COPYING").mkdir()
    assert [str(name) for name in own_files(folder, ("LICENSE*", "COPYING*", "NOTICE*"))] == [
        *("LICENSE", "LICENSE-2", "LICENSE.md", "NOTICE")
    ]


def test_a_snapshot_of_the_hub_s_cache_links_to_its_blobs(tmp_path):
    repository = tmp_path / "models--org--name"
    blob, snapshot = repository / "blobs" / "0a1b", repository / "snapshots" / "c0ffee"
    blob.parent.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    blob.write_text('{"model_type": "llama"}')
    (snapshot / "config.json").symlink_to("../../blobs/0a1b")
    check_folder(snapshot)
    elsewhere = tmp_path / "models--org--other" / "blobs" / "2c"
    elsewhere.parent.mkdir(parents=True)
    elsewhere.write_text("{}")
    (snapshot / "generation_config.json").symlink_to(elsewhere)
    with pytest.raises(UserError, match="outside the folder"):
        check_folder(snapshot)
