"""What a user does, with the installed version of transformers: load, generate, convert, evaluate, train."""

import configparser
import importlib.metadata
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run import OLDEST
from tiny import CACHE, save_dense, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, DynamicCache, MixtralForCausalLM

from mhmoe.configuration import configuration_mhmoe
from mhmoe.conversion import convert
from mhmoe.conversion.families import FAMILIES
from mhmoe.conversion.verify_command import main as verify
from mhmoe.evaluation import evaluate_model
from mhmoe.training.train_command import main as train


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SMALL = {"num_moe_heads": 4, "num_experts": 6, "moe_intermediate_size": 8}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """What `run.py` has had another version save, or what this one does."""
    if "MHMOE_SAVED" in os.environ:
        return Path(os.environ["MHMOE_SAVED"])
    folder = tmp_path_factory.mktemp("saved")
    subprocess.run([sys.executable, HERE / "saved_models.py", folder], check=True)
    return folder


def test_saved_models_load_without_the_package_and_without_a_warning(saved, tmp_path):
    completed = subprocess.run(
        [sys.executable, HERE / "without_package.py", saved],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 0, completed.stderr[-4000:]


def test_saved_models_load_with_the_package(saved):
    expected = torch.load(saved / "plain.pt")["logits"]
    mask = torch.ones(2, 10, dtype=torch.int64)
    mask[1, :3] = 0
    ids = torch.randint(3, 128, (2, 10), generator=torch.Generator().manual_seed(0))
    for backend in ("eager", "subtoken", "grouped_mm", "batched_mm"):
        model = AutoModelForCausalLM.from_pretrained(saved / "plain", experts_implementation=backend)
        with torch.no_grad():
            assert (model(ids, attention_mask=mask).logits - expected).abs().max() <= 2e-6, backend


def test_a_version_that_is_too_old_says_so_in_one_line(monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "5.5.4" if name == "transformers" else version(name)
    )
    with pytest.raises(ImportError, match=r"transformers>=5\.12 is required .* found transformers==5\.5\.4") as raised:
        runpy.run_path(configuration_mhmoe.__file__)
    assert "\n" not in str(raised.value).strip()


def test_the_oldest_versions_tested_are_those_of_the_package():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    floors = dict(re.findall(r"^([\w-]+)>=([\d.]+)", setup["options"]["install_requires"], re.MULTILINE))
    del floors["torch"]  # of which there are no small builds of old versions
    tested = dict(re.findall(r"^([\w-]+)==([\d.]+)", (HERE / f"{OLDEST}.txt").read_text(), re.MULTILINE))
    assert floors.keys() <= tested.keys()
    for name, floor in floors.items():
        assert f"{tested[name]}.".startswith(f"{floor}."), name


def test_a_cache_is_passed_on_under_the_name_that_the_library_uses():
    model = tiny_model(sliding_window=4)
    ids = torch.randint(3, 128, (1, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(ids)
        cache = model(ids[:, :5], use_cache=True)[CACHE]
        step = model(ids[:, 5:], **{CACHE: cache})
    assert isinstance(whole[CACHE], DynamicCache)
    torch.testing.assert_close(step.logits, whole.logits[:, 5:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kept",
    [0, 3, torch.tensor([1, 4]), torch.tensor([[0, 1], [6, 2]]), torch.ones(2, 7, dtype=torch.bool).tril()],
    ids=["all", "last", "positions", "positions of rows", "mask"],
)
def test_logits_to_keep(kept):
    model = tiny_model()
    ids = torch.randint(3, 128, (2, 7), generator=torch.Generator().manual_seed(1))
    rows = torch.arange(2)[:, None]
    with torch.no_grad():
        logits = model(ids).logits
        if isinstance(kept, int):
            expected = logits[:, 7 - kept if kept else 0 :]
        elif kept.dim() == 1:
            expected = logits[:, [1, 4]]
        else:
            expected = logits[kept] if kept.dtype == torch.bool else logits[rows, kept]
        torch.testing.assert_close(model(ids, logits_to_keep=kept).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_convert_and_verify(tmp_path, family):
    source = save_dense(tmp_path / "dense", family=family, head_dim=12)
    verify([str(source), str(convert(source, tmp_path / "out", **SMALL))])


@pytest.mark.parametrize("strategy", ["anchored", "calibrated"])
def test_convert_with_other_strategies(tmp_path, strategy):
    source = save_dense(tmp_path / "dense", family="qwen2", use_sliding_window=True, sliding_window=6)
    text = tmp_path / "text.txt"
    text.write_text("A sentence to calibrate with, again and again. " * 200)
    sizes = {"num_moe_heads": 2, "num_experts": 4, "moe_intermediate_size": 24}
    calibration = {"calibration": text} if strategy == "calibrated" else {}
    output = convert(source, tmp_path / "out", strategy=strategy, **calibration, **sizes)
    assert AutoModelForCausalLM.from_pretrained(output).config.model_type == "mhmoe"


def test_evaluate_and_train(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    results = evaluate_model("model", ["mhmoe_smoke"], batch_size=4, device="cpu", limit=4)
    assert 0 <= results["results"]["mhmoe_smoke"]["acc,none"] <= 1
    assert results["routing"]["mhmoe_smoke"]["share_activated"] > 0
    Path("text.txt").write_text("Some words to train on, and some more of them. " * 60)
    flags = {"train_file": "text.txt", "output_dir": "out", "block_size": 32, "max_steps": 3, "report_to": "none"}
    train(
        ["model", *(part for name, value in flags.items() for part in (f"--{name}", str(value))), "--use_cpu", "true"]
    )
    assert AutoModelForCausalLM.from_pretrained("out").config.model_type == "mhmoe"


def test_backends_serve_the_library_s_own_models():
    config = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralForCausalLM.config_class(**config, num_key_value_heads=2, vocab_size=64, num_local_experts=4)
    torch.manual_seed(0)
    model, ids = MixtralForCausalLM(config).eval(), torch.arange(10)[None]
    logits = []
    for backend in ("eager", "subtoken"):
        model.set_experts_implementation(backend)
        logits.append(model(ids).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
