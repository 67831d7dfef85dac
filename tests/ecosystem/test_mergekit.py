"""mergekit on two MH-MoE models: every tensor is merged, and the folder loads as a model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


pytest.importorskip("mergekit")

from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from paths import SUPPORT
from tiny import tiny_model, tiny_tokenizer

from mhmoe import MHMoEForCausalLM


FIRST, SECOND = "first", "second"
WEIGHTED = [
    {"model": FIRST, "parameters": {"weight": 0.25}},
    {"model": SECOND, "parameters": {"weight": 0.75}},
]
RECIPES = {
    "linear": {"merge_method": "linear", "models": WEIGHTED},
    "slerp": {
        "merge_method": "slerp",
        "base_model": FIRST,
        "models": [{"model": FIRST}, {"model": SECOND}],
        "parameters": {"t": 0.75},
    },
    "ties": {
        "merge_method": "ties",
        "base_model": FIRST,
        "models": [{"model": SECOND, "parameters": {"weight": 0.75, "density": 1.0}}],
        "parameters": {"normalize": False},
    },
}


def slerp(first: torch.Tensor, second: torch.Tensor, t: float) -> torch.Tensor:
    """Along the great circle, by the angle between two tensors as vectors."""
    first, second = first.double(), second.double()
    angle = torch.arccos((first * second).sum() / (first.norm() * second.norm()))
    if angle.sin().abs() < 1e-3 or angle.isnan():
        return (1 - t) * first + t * second
    return (((1 - t) * angle).sin() * first + (t * angle).sin() * second) / angle.sin()


@pytest.fixture(scope="module")
def merged(tmp_path_factory) -> Path:
    """The folder with both models, and a merge by each recipe, in a folder of its name."""
    folder = tmp_path_factory.mktemp("merged")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        for seed, name in enumerate((FIRST, SECOND)):
            model = tiny_model(seed, num_moe_heads=4, shared_expert_intermediate_size=16, mlp_only_layers=[0])
            model.save_pretrained(name)
            tiny_tokenizer().save_pretrained(name)
        for name, recipe in RECIPES.items():
            configuration = MergeConfiguration.model_validate({**recipe, "dtype": "float32"})
            # the card would be made of what the Hub says of the models
            options = MergeOptions(trust_remote_code=True, write_model_card=False, copy_tokenizer=True)
            run_merge(configuration, name, options)
        yield folder


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_tensor_is_merged(merged, recipe):
    first, second, weights = (load_file(merged / name / "model.safetensors") for name in (FIRST, SECOND, recipe))
    assert weights.keys() == first.keys()
    for name, weight in weights.items():
        if recipe == "slerp":
            expected = slerp(first[name], second[name], 0.75)
        else:
            expected = 0.25 * first[name].double() + 0.75 * second[name].double()
        torch.testing.assert_close(weight.double(), expected, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: n + text)


@pytest.mark.parametrize("recipe", RECIPES)
def test_folder_loads_with_and_without_the_package(merged, recipe, tmp_path):
    folder = tmp_path / recipe
    shutil.copytree(merged / recipe, folder)
    with torch.no_grad():
        model = MHMoEForCausalLM.from_pretrained(folder)
        outputs = model(torch.arange(3, 13)[None]).logits
    for file in (merged / FIRST).glob("*.py"):  # as docs/scale.md says; mergekit copies the config's code alone
        shutil.copy(file, folder)
    job = {
        "source": str(folder),
        "auto_class": "AutoModelForCausalLM",
        "report": str(tmp_path / "report.pt"),
        "resaved": str(tmp_path / "resaved"),
    }
    (tmp_path / "jobs.json").write_text(json.dumps([job]))
    script = SUPPORT / "without_mhmoe.py"
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, str(script), str(tmp_path / "jobs.json")], check=True, env=environment)
    report = torch.load(tmp_path / "report.pt", weights_only=False)
    assert "error" not in report, report["error"]
    assert torch.equal(report["outputs"], outputs)
