"""`mhmoe plan --gpus`: its formulas against bytes that were measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paths import ROOT, SUPPORT
from tiny import save_dense, tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from mhmoe import MHMoEConfig, MHMoEForCausalLM, cli
from mhmoe.configuration import costs
from mhmoe.conversion.layout_plan import LayoutOptions, plan_layouts
from mhmoe.conversion.layouts import (
    GIB,
    Run,
    Weights,
    activation_bytes,
    inference_layouts,
    read_memory,
    training_layouts,
)
from mhmoe.conversion.plan import plan
from mhmoe.errors import UserError


MODELS = {
    "shared": {"shared_expert_intermediate_size": 16, "mlp_only_layers": [0]},
    "tied": {"tie_word_embeddings": True, "num_moe_heads": 3},
    "latent": {"moe_latent_size": 32, "private_experts": True, "num_experts": 4},
    "P1": {"gated_mlp": False, "head_merge_bias": True, "router_type": "xmoe", "use_qk_norm": True, "mlp_bias": True},
}


# the weights


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_of_the_model(name):
    config = tiny_config(**MODELS[name])
    weights = Weights.of(config)
    counts = {key: parameter.numel() for key, parameter in MHMoEForCausalLM(config).named_parameters()}
    counted = costs(config)
    assert weights.total == sum(counts.values()) == counted.parameters
    assert weights.layer_experts * len(config.moe_layers) == counted.expert_parameters
    layers = [sum(number for key, number in counts.items() if f"layers.{layer}." in key) for layer in range(2)]
    assert weights.layer == max(layers)
    assert weights.outside == weights.total - sum(layers)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[Path, dict]:
    """Models, and what each of two processes held of them."""
    folder = tmp_path_factory.mktemp("runs") / "models"
    for name, overrides in MODELS.items():
        tiny_model(**overrides).save_pretrained(folder / name)
    save_dense(folder / "dense")
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *(str(SUPPORT / "layout_bytes.py"), str(folder)),
        ],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return folder, json.loads(Path(f"{folder}.json").read_text())


@pytest.mark.parametrize("name", [*MODELS, "dense"])
@pytest.mark.parametrize("layout", ["DDP", "FSDP2", "FSDP2 + EP 2"])
def test_states_of_two_processes_are_as_planned(measured, layout, name):
    folder, bytes_of = measured
    planned = training_layouts(Weights.of(AutoConfig.from_pretrained(folder / name)), 2, itemsize=4, activations=0)
    if f"{layout} {name}" not in bytes_of:
        assert layout not in planned  # there are no experts
        return
    of_planned = {kind: getattr(planned[layout], kind) for kind in ("weights", "gradients", "optimizer")}
    for kind, expected in of_planned.items():
        held = [found[kind] for found in bytes_of[f"{layout} {name}"]]
        if layout == "DDP":
            assert held == [expected, expected]
        else:  # rows of a tensor that two do not divide
            assert sum(held) == pytest.approx(2 * expected, rel=0.002)
            assert max(held) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", [*MODELS, "dense"])
def test_weights_under_tensor_parallelism_are_as_planned(measured, name):
    folder, bytes_of = measured
    config = AutoConfig.from_pretrained(folder / name)
    planned = inference_layouts(Weights.of(config), 2, itemsize=4, working=0, config=config)
    assert [found["weights"] for found in bytes_of[f"TP 2 {name}"]] == 2 * [planned["TP 2"].weights]


# the activations


def saved_bytes(model: torch.nn.Module, ids: torch.Tensor) -> int:
    """Kept for the backward pass beside the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["shared", "tied", "latent", "two matrices", "dense"])
def test_activations_are_as_planned(name, checkpointing):
    sizes = {"num_hidden_layers": 6, "max_position_embeddings": 512}
    overrides = {"two matrices": {"gated_mlp": False, "num_experts_per_tok": 3}, **MODELS}.get(name, {})
    if name == "dense":
        config = LlamaConfig(vocab_size=128, hidden_size=48, intermediate_size=96, num_attention_heads=4, **sizes)
    else:
        config = tiny_config(**sizes, **overrides)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    if name != "dense":
        model.set_experts_implementation("grouped_mm")
    ids = torch.randint(3, 128, (2, 256))
    if checkpointing:
        model.gradient_checkpointing_enable()
    planned = activation_bytes(config, Run(2, 256, checkpointing), 4)
    logits = 3 * 4 * 512 * config.vocab_size  # of which the log softmax is kept
    kept = planned - logits * 2 // 3
    if checkpointing:  # at once are one layer's too, which are not kept
        one = activation_bytes(config, Run(2, 256), 4) - activation_bytes(shorter(config), Run(2, 256), 4)
        kept -= one
    assert saved_bytes(model, ids) == pytest.approx(kept, rel=0.03)


def shorter(config):
    """Without its last layer."""
    return type(config).from_dict({**config.to_dict(), "num_hidden_layers": 5, "layer_types": None})


# the plan


@pytest.fixture
def llama_7b(tmp_path) -> Path:
    """A config alone."""
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    LlamaConfig(**sizes, dtype="bfloat16").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_seven_billion_from_the_config_alone(llama_7b):
    dense, exact, *_ = plan(llama_7b).models
    assert dense.parameters == 6_738_415_616  # Llama 2 7B
    asked = LayoutOptions(gpus=8, memory="80GB", per_device_train_batch_size=1, gradient_checkpointing=True)
    planned = plan_layouts(llama_7b, asked)
    assert planned.tokens == 1024
    laid_out = {model.name: model for model in planned.models}
    assert laid_out["exact"].parameters == exact.parameters
    of_dense = laid_out["dense"].training
    assert of_dense["one GPU"].total == pytest.approx(16 * dense.parameters, rel=0.02)
    assert not planned.fits(of_dense["one GPU"])
    assert not planned.fits(of_dense["DDP"])
    assert planned.fits(of_dense["FSDP2"])
    assert of_dense["FSDP2"].weights == 4 * dense.parameters // 8
    assert planned.fits(laid_out["exact"].training["FSDP2 + EP 8"])
    assert laid_out["exact"].training["FSDP2 + EP 8"].total < laid_out["exact"].training["FSDP2"].total
    assert laid_out["dense"].inference["one GPU"].weights == 2 * dense.parameters
    assert planned.fits(laid_out["dense"].inference["one GPU"])
    # older versions of transformers leave the input embedding whole
    assert laid_out["dense"].inference["TP 8"].weights == pytest.approx(2 * dense.parameters / 8, rel=0.15)


def test_the_page_shows_this_plan(llama_7b):
    asked = LayoutOptions(gpus=8, memory="80GB", per_device_train_batch_size=1, gradient_checkpointing=True)
    page = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
    lines = [line for line in plan_layouts(llama_7b, asked).table().splitlines() if ": torchrun" not in line]
    assert len(lines) > 10
    for line in lines:
        assert line.rstrip() in page or line.startswith("  TP"), line  # which depends on the version of transformers


def test_more_gpus_never_need_more_memory_each(llama_7b):
    totals = {}
    for gpus in (2, 8, 64):
        for model in plan_layouts(llama_7b, LayoutOptions(gpus=gpus, memory="80")).models:
            for name, layout in model.training.items():
                totals.setdefault((model.name, name.split(" + ")[0]), []).append(layout.total)
    assert all(found == sorted(found, reverse=True) for found in totals.values())


def run(capsys, monkeypatch, *arguments) -> str:
    monkeypatch.setattr("sys.argv", ["mhmoe", "plan", *map(str, arguments)])
    capsys.readouterr()
    cli.main()
    return capsys.readouterr().out


def test_command(tmp_path, capsys, monkeypatch, llama_7b):
    printed = run(capsys, monkeypatch, llama_7b, "--gpus", 8, "--memory", "80GB", "--gradient-checkpointing")
    assert "mhmoe convert" in printed
    assert "8 GPUs of 80.0 GiB, 8,192 tokens on each at once" in printed
    assert (
        "dense: torchrun --nproc_per_node 8 -m mhmoe train MODEL --distributed_config '{\"fsdp_size\": 8}'" in printed
    )
    few = run(capsys, monkeypatch, llama_7b, "--gpus", 1, "--memory", "8GB")
    assert "one GPU of 8.0 GiB" in few
    assert "exact: nothing fits for training; try --gradient-checkpointing" in few

    MHMoEConfig.from_preset("p2-mhmoe-head3").save_pretrained(tmp_path / "p2")
    printed = run(capsys, monkeypatch, tmp_path / "p2", "--gpus", 4, "--memory", 24)
    assert "mhmoe convert" not in printed
    assert "p2: mhmoe train MODEL\n" in printed
    as_json = json.loads(run(capsys, monkeypatch, tmp_path / "p2", "--gpus", 4, "--memory", 24, "--json"))
    (model,) = as_json["layouts"]["models"]
    asked = LayoutOptions(gpus=4, memory="24")
    (planned,) = plan_layouts(tmp_path / "p2", asked).models
    assert model["training"]["FSDP2"]["total"] == planned.training["FSDP2"].total
    assert model["training"]["FSDP2"]["fits"] is True
    half = plan_layouts(tmp_path / "p2", asked, dtype="bfloat16").models[0]
    assert 2 * half.training["FSDP2"].optimizer == planned.training["FSDP2"].optimizer


def test_memory_in_any_spelling():
    assert read_memory("80") == read_memory("80GB") == read_memory("80 GiB") == read_memory(80) == 80 * GIB
    assert read_memory("512MiB") == GIB // 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": 8}, "gpus, memory: give both of them"),
        ({"memory": "80"}, "gpus, memory: give both of them"),
        ({"gpus": 0, "memory": "80"}, "gpus=0 must be at least 1"),
        ({"gpus": 8, "memory": "much"}, "memory=much: is no size"),
        ({"gpus": 8, "memory": "0"}, "memory=0: is no size"),
        ({"gpus": 8, "memory": "8..0GB"}, "memory=8..0GB: is no size"),
        ({"gpus": 8, "memory": "8TB"}, "memory=8TB: is no size"),
        ({"gpus": 8, "memory": "8", "block_size": 0}, "block_size=0 must be at least 1"),
    ],
)
def test_mistakes_get_one_line(llama_7b, options, message):
    with pytest.raises(UserError, match=message) as error:
        plan_layouts(llama_7b, LayoutOptions(**options))
    assert "\n" not in str(error.value)


def test_a_config_that_no_weights_can_have_gets_one_line(llama_7b):
    config = json.loads((llama_7b / "config.json").read_text())
    for changes, message in (
        ({"dtype": "float8_e4m3fn"}, "dtype=float8_e4m3fn is not converted"),
        ({"hidden_size": 0}, "hidden_size"),
    ):
        (llama_7b / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=message):
            plan_layouts(llama_7b, LayoutOptions(gpus=8, memory="80"))
    with pytest.raises(UserError, match="no such folder"):
        plan_layouts(llama_7b / "nowhere", LayoutOptions(gpus=8, memory="80"))
