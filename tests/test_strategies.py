"""The conversion strategies other than `exact`: what each promises, on tiny dense models."""

import shlex

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tiny import save_dense
from transformers import AutoModelForCausalLM

from mhmoe.conversion import convert, verify
from mhmoe.conversion.convert import STRATEGIES, Strategy
from mhmoe.conversion.convert_command import main
from mhmoe.errors import UserError
from mhmoe.model_cards.card import PROMISES, UNTRAINED


SIZES = {"num_moe_heads": 4, "num_experts": 6, "moe_intermediate_size": 8}
DENSE_FFN = "model.layers.0.mlp"


@pytest.fixture
def dense(tmp_path):
    return save_dense(tmp_path / "dense")


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def edit_weights(folder, name, edit):
    weights = weights_of(folder)
    weights[name] = edit(weights[name])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_every_strategy_has_its_promise():
    assert STRATEGIES.keys() == PROMISES.keys() == UNTRAINED.keys() == set(Strategy.__args__)
    assert all(name == strategy.name for name, strategy in STRATEGIES.items())


@pytest.mark.parametrize("heads", [1, 4])
def test_random_copies_all_but_the_ffns(tmp_path, dense, heads):
    output = convert(dense, tmp_path / "out", strategy="random", **{**SIZES, "num_moe_heads": heads})
    old, new = weights_of(dense), weights_of(output)
    copied = {name for name in old if ".mlp." not in name}
    assert copied == {name for name in new if ".mlp." not in name}
    assert all(torch.equal(old[name], new[name]) for name in copied)
    for name in new.keys() - copied:
        assert "shared_expert" not in name
        assert new[name].count_nonzero() == new[name].numel(), name
    assert AutoModelForCausalLM.from_pretrained(output).config.shared_expert_intermediate_size == 0
    assert "untrained" in ModelCard.load(output / "README.md").text


def test_random_is_verified_by_what_was_copied(tmp_path, dense):
    output = convert(dense, tmp_path / "out", strategy="random", **SIZES)
    verification = verify(dense, output, max_tokens=64)
    assert verification.broken_promises == []
    assert verification.max_logit_difference > 0.1
    edit_weights(output, "model.layers.1.self_attn.q_proj.weight", lambda weight: weight + 1e-6)
    (broken,) = verify(dense, output, max_tokens=64).broken_promises
    assert broken.startswith("model.layers.1.self_attn.q_proj.weight is not")


def test_random_has_a_shared_expert_where_asked(tmp_path):
    source = save_dense(tmp_path / "dense", torch.bfloat16, mlp_bias=True)
    options = {"shared_expert_intermediate_size": 40, "norm_topk_prob": False}
    output = convert(source, tmp_path / "out", strategy="random", **SIZES, **options)
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.model.layers[0].mlp.shared_expert.gate_proj.weight.shape == (40, 48)
    assert model.config.norm_topk_prob is False
    assert not model.model.layers[0].mlp.shared_expert.down_proj.bias.any()
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{}, {"norm_topk_prob": False, "shared_expert_intermediate_size": 24}], ids=str)
def test_the_reported_command_makes_the_same_weights(tmp_path, dense, options):
    output = convert(dense, tmp_path / "out", strategy="random", seed=5, **SIZES, **options)
    before = (output / "model.safetensors").read_bytes()
    command = next(line for line in (output / "README.md").read_text().splitlines() if line.startswith("mhmoe "))
    main([*shlex.split(command)[2:], "--overwrite"])
    assert (output / "model.safetensors").read_bytes() == before
    assert AutoModelForCausalLM.from_pretrained(output).config.norm_topk_prob is options.get("norm_topk_prob", True)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"strategy": "exact", "shared_expert_intermediate_size": 95}, "--shared-expert-intermediate-size 95.*96")],
    ids=str,
)
def test_what_a_strategy_cannot_keep_is_refused(tmp_path, dense, options, named):
    with pytest.raises(UserError, match=named):
        convert(dense, tmp_path / "out", **{**SIZES, **options})
    assert not (tmp_path / "out").exists()
