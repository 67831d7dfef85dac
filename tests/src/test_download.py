"""What is fetched from the Hub: the model's own files, and of its weights those that will be read."""

import json
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from tiny import save_dense

from mhmoe import sources
from mhmoe.conversion.checkpoint import DenseCheckpoint
from mhmoe.errors import UserError


OTHERS = [
    "consolidated.safetensors",
    "consolidated.00.pth",
    "pytorch_model.bin",
    "original/params.json",
    "original/tokenizer.model",
    "original/consolidated.00.pth",
    "onnx/model.onnx",
    "onnx/config.json",
    "onnx/model.safetensors",
    "gguf/model.gguf",
    "LICENSES/MIT.txt",
    "model-00009-of-00009.safetensors",
    "model.fp16.safetensors",
    "README.md/x",
    "modeling_own.py",
]
OWN = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "LICENSE",
    "README.md",
    "additional_chat_templates/rag.jinja",
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository of one folder, `hub.files`, behind `snapshot_download`; `hub.fetched` is what was asked for."""

    class Hub:
        folder = tmp_path / "cache" / "snapshots" / "0123abc"
        files: set[str] = set()
        fetched: set[str] = set()
        revisions: list[str | None] = []

    hub = Hub()

    def snapshot_download(repo_id, *, revision=None, allow_patterns=None, ignore_patterns=None):
        hub.revisions.append(revision)
        names = filter_repo_objects(sorted(hub.files), allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        for name in names:
            hub.fetched.add(name)
            (hub.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (hub.folder / name).write_bytes((tmp_path / "dense" / name).read_bytes())
        return str(hub.folder)

    monkeypatch.setattr(sources, "snapshot_download", snapshot_download)
    return hub


def fill(hub, dense: Path) -> set[str]:
    (dense / "additional_chat_templates").mkdir()
    (dense / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    own = {str(path.relative_to(dense)) for path in dense.rglob("*") if path.is_file()}
    hub.files = own | set(OTHERS)
    return own


@pytest.mark.parametrize("size", ["5GB", "40KB"])
def test_the_weights_that_are_read(hub, tmp_path, size):
    dense = save_dense(tmp_path / "dense", max_shard_size=size)
    own = fill(hub, dense)
    opened = DenseCheckpoint("someone/dense", "main")
    assert hub.fetched == own
    assert own >= OWN
    assert opened.name == "someone/dense"
    assert opened.tensors.keys() == DenseCheckpoint(dense).tensors.keys()
    assert set(hub.revisions) == {"main", "0123abc"}
    assert hub.revisions[-1] == "0123abc"  # whatever the branch becomes meanwhile


def test_an_index_beside_whole_weights_is_not_followed(hub, tmp_path):
    dense = save_dense(tmp_path / "dense")
    own = fill(hub, dense)
    index = {"weight_map": {"lm_head.weight": "model-00009-of-00009.safetensors"}}
    (dense / "model.safetensors.index.json").write_text(json.dumps(index))
    hub.files.add("model.safetensors.index.json")
    DenseCheckpoint("someone/dense")
    assert hub.fetched == own | {"model.safetensors.index.json"}


def test_headers_need_no_weights(hub, tmp_path):
    own = fill(hub, save_dense(tmp_path / "dense"))
    sources.find_folder("someone/dense", weights=False)
    assert hub.fetched == own - {"model.safetensors"}


def test_an_adapter_on_the_hub_is_refused_before_its_weights_are_fetched(hub, tmp_path):
    dense = save_dense(tmp_path / "dense")
    (dense / "adapter_config.json").write_text("{}")
    fill(hub, dense)
    with pytest.raises(UserError, match="merge it first"):
        DenseCheckpoint("someone/dense")
    assert "model.safetensors" not in hub.fetched


def test_an_index_that_knows_less_or_more_than_its_shards(tmp_path):
    dense = save_dense(tmp_path / "dense", max_shard_size="40KB", tie_word_embeddings=True)
    file = dense / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    expected = DenseCheckpoint(dense).tensors
    del index["weight_map"]["model.norm.weight"]
    index["weight_map"]["lm_head.weight"] = min(index["weight_map"].values())  # tied, and stored once
    file.write_text(json.dumps(index))
    assert DenseCheckpoint(dense).tensors == expected
    lost = max(index["weight_map"].values())
    weights = load_file(dense / lost)
    del weights[min(weights)]
    save_file(weights, dense / lost, {"format": "pt"})
    assert len(DenseCheckpoint(dense).tensors) == len(expected) - 1  # which a conversion then misses by name
