"""Folders of encoders that load where `mhmoe` is not installed."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import without_mhmoe
from huggingface_hub import HfApi, RepoUrl
from tiny_encoders import TINY
from transformers import AutoConfig, AutoModel, PreTrainedModel


ROOT = Path(__file__).resolve().parents[2]
# one of each kind: a picture, text with an FFN in two halves, two towers, both at once
SAVED = {
    "vit": "AutoModelForImageClassification",
    "bert": "AutoModelForMaskedLM",
    "clip": "AutoModel",
    "vilt-vqa": "AutoModelForVisualQuestionAnswering",
    "git": "AutoModelForCausalLM",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    for name in SAVED:
        TINY[name].make(output_router_logits=True).save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def remote(saved) -> Path:
    """What a process without `mhmoe` made of the folders."""
    root = saved / "remote"
    root.mkdir()
    jobs = []
    for name, auto_class in SAVED.items():
        torch.save(TINY[name].inputs(), root / f"{name}.inputs")
        job = {"source": saved / name, "report": root / f"{name}.pt", "resaved": root / name}
        job["inputs"] = root / f"{name}.inputs"
        jobs.append({"auto_class": auto_class, **{key: str(path) for key, path in job.items()}})
    (root / "jobs.json").write_text(json.dumps(jobs))
    subprocess.run(
        [sys.executable, without_mhmoe.__file__, root / "jobs.json"],
        env={**os.environ, "HF_MODULES_CACHE": str(root / "modules")},
        cwd=root,
        check=True,
        capture_output=True,
    )
    return root


def report(root: Path, name: str) -> dict:
    found = torch.load(root / f"{name}.pt", weights_only=False)
    assert "error" not in found, found["error"]
    return found


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("name", SAVED)
def test_loads_with_the_same_outputs_and_saves_again(saved, remote, name):
    tiny = TINY[name]
    found = report(remote, name)
    assert found["class"] == tiny.model
    assert found["module"].endswith(".modeling_mhmoe_encoders")
    assert found["module"].startswith("transformers_modules.")
    model = tiny.model_class.from_pretrained(saved / name).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        torch.testing.assert_close(found["outputs"], model(**tiny.inputs())[0])
    assert files_of(remote / name) == files_of(saved / name)
    again = tiny.model_class.from_pretrained(remote / name)
    for (key, one), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), key


def test_the_code_is_the_project_s_own(saved):
    for file in (saved / "vit").glob("*.py"):
        folders = {"configuration_mhmoe": "configuration"}
        of_encoders = file.stem.endswith("_encoders") or file.stem == "families"
        folder = "encoders" if of_encoders else folders.get(file.stem, "modeling_mhmoe")
        assert file.read_text() == (ROOT / folder / file.name).read_text(), file.name
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                assert name.split(".")[0] in {"torch", "transformers", "huggingface_hub"} | sys.stdlib_module_names


def test_auto_map_names_every_class(saved):
    auto_map = json.loads((saved / "vit" / "config.json").read_text())["auto_map"]
    assert auto_map["AutoConfig"] == "configuration_mhmoe_encoders.MHMoEViTConfig"
    assert auto_map["AutoModel"] == "modeling_mhmoe_encoders.MHMoEViTModel"
    assert auto_map["AutoModelForMaskedImageModeling"] == "modeling_mhmoe_encoders.MHMoEViTForMaskedImageModeling"


def test_push_sends_what_save_pretrained_writes(saved, tmp_path, monkeypatch):
    sent = []

    def upload(model, working_dir, *args, **kwargs):
        sent.append(files_of(Path(working_dir)))

    monkeypatch.setattr(PreTrainedModel, "_upload_modified_files", upload)
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: RepoUrl("https://huggingface.co/someone/vit"))
    model = TINY["vit"].make(output_router_logits=True)
    model.push_to_hub("someone/vit")
    model.save_pretrained(tmp_path / "vit", push_to_hub=True, repo_id="someone/again")
    written = files_of(saved / "vit")
    assert files_of(tmp_path / "vit") == written
    assert [files & written for files in sent] == [written] * 2


def test_a_config_alone(tmp_path):
    config = TINY["clip"].config()
    config.save_pretrained(tmp_path)
    assert files_of(tmp_path) == {
        "config.json", "configuration_mhmoe_encoders.py", "configuration_mhmoe.py", "families.py",
    }  # fmt: skip
    assert AutoConfig.from_pretrained(tmp_path).vision_config.to_diff_dict() == config.vision_config.to_diff_dict()


@pytest.mark.parametrize("name", SAVED)
def test_with_mhmoe_the_package_s_classes_load_it(saved, name):
    model = AutoModel.from_pretrained(saved / name, trust_remote_code=True)
    assert type(model).__module__ == "mhmoe.encoders.modeling_mhmoe_encoders"
