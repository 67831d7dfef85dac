"""Models that are folders or on the Hub, and files that appear at once."""

import fnmatch
import json
import os
from pathlib import Path

import pytest

from mhmoe import files, sources
from mhmoe.errors import UserError


REPOSITORY = {
    "config.json": "{}",
    "tokenizer.json": "{}",
    "README.md": "",
    "LICENSE": "",
    "model-00001-of-00002.safetensors": "",
    "model-00002-of-00002.safetensors": "",
    "consolidated.safetensors": "",
    "original/params.json": "{}",
    "onnx/model.safetensors": "",
    "pytorch_model.bin": "",
}
INDEX = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A Hub with one repository, and the folder that downloads go to."""
    repository = {**REPOSITORY, "model.safetensors.index.json": json.dumps(INDEX)}
    folder = tmp_path / "0123abc"

    def download(repo_id, revision=None, allow_patterns=None, ignore_patterns=()):
        assert (repo_id, revision) in (("org/name", "main"), ("org/name", "0123abc"))
        for name, content in repository.items():
            wanted = any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
            if wanted and not any(fnmatch.fnmatch(name, pattern) for pattern in ignore_patterns):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(content)
        return str(folder)

    monkeypatch.setattr(sources, "snapshot_download", download)
    monkeypatch.setattr(sources, "_repository", repository, raising=False)
    return folder


def downloaded(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


TEXTS = {"config.json", "tokenizer.json", "README.md", "LICENSE", "model.safetensors.index.json"}
SHARDS = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}


def test_only_what_is_used_is_downloaded(hub):
    assert sources.find_folder("org/name", "main", weights=False) == (hub, "org/name")
    assert downloaded(hub) == TEXTS
    assert sources.find_folder("org/name", "main") == (hub, "org/name")
    assert downloaded(hub) == TEXTS | SHARDS


@pytest.mark.parametrize("index", [None, "{", "[]", '{"weight_map": 3}'])
def test_model_in_one_file(hub, index):
    del sources._repository["model.safetensors.index.json"]
    sources._repository["model.safetensors"] = ""
    if index is not None:
        sources._repository["model.safetensors.index.json"] = index
    sources.find_folder("org/name", "main")
    assert downloaded(hub) - TEXTS == {"model.safetensors"}


def test_folder(tmp_path):
    assert sources.find_folder(str(tmp_path)) == (tmp_path, None)
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    assert sources.find_folder(str(snapshot)) == (snapshot, "org/name")
    for name in ("models--org--na--me", "models--org--na me"):  # of no model that the Hub could have
        other = tmp_path / name / "snapshots" / "0123abc"
        other.mkdir(parents=True)
        assert sources.find_folder(str(other)) == (other, None)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="a file, not a model folder"):
        sources.find_folder(str(tmp_path / "file"))
    with pytest.raises(UserError, match="not a model id of the Hub"):
        sources.find_folder("not a name!")


def test_file_appears_at_once(tmp_path):
    file = tmp_path / "a.json"
    files.write_json(file, {"a": "\u00e9"})
    assert json.loads(file.read_text()) == {"a": "\u00e9"}

    def fail_halfway():
        with files.replacing(file) as unfinished:
            unfinished.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_halfway()
    assert json.loads(file.read_text()) == {"a": "\u00e9"}
    assert os.listdir(tmp_path) == ["a.json"]


def test_folder_that_cannot_be_written_to(tmp_path):
    files.check_writable("output", tmp_path / "new" / "folder")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output_dir: .*file is not a folder that can be written to"):
        files.check_writable("output_dir", tmp_path / "file" / "folder")
    assert os.listdir(tmp_path) == ["file"]
