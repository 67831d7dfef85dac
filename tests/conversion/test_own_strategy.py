"""A strategy from outside the package, through the public registry, is one like those inside."""

from dataclasses import dataclass

import pytest
import torch
from commands import run
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny import save_dense

from mhmoe.conversion import (
    STRATEGIES,
    ConversionStrategy,
    Promise,
    StrategyOptions,
    convert,
    plan,
    register_strategy,
    verify,
)
from mhmoe.conversion.convert_command import parser
from mhmoe.errors import UserError
from mhmoe.options import option


SIZES = {"num_moe_heads": 4, "num_experts": 6, "moe_intermediate_size": 8}


@dataclass(frozen=True, kw_only=True)
class HalvedOptions(StrategyOptions):
    first_neuron: int = option(0, "of those that stay (default: %(default)s)", "N")
    in_order: bool = option(True, "whether neurons keep their order")


class Halved(ConversionStrategy):
    name = "halved"
    summary = "half of the dense neurons shared, the others gone"
    promise = Promise("half the work", "half of each dense FFN is there.", max_perplexity_ratio=50.0)
    untrained = "It says half of what the dense model says."
    Options = HalvedOptions
    defaults = {"shared_expert_intermediate_size": "half of the dense FFN"}
    made_from = {"shared_expert.down_proj.weight": "down_proj.weight"}

    @classmethod
    def shared_width(cls, dense_config, sizes):
        return cls.needs_width(dense_config.intermediate_size // 2, sizes)

    @classmethod
    def check(cls, recipe):
        if recipe.config.mlp_bias:
            raise UserError("mlp_bias=True: strategy halved has no place for it")

    @classmethod
    def peak_memory(cls, recipe, stored_itemsize):
        return 12_345_000_000

    def layer(self, layer, ffn):
        first, width = self.options.first_neuron, self.config.shared_expert_intermediate_size
        neurons = torch.arange(first, first + width)
        neurons = neurons if self.options.in_order else neurons.flip(0)
        yield "shared_expert.down_proj.weight", ffn["down_proj.weight"][:, neurons]  # an order of its own
        for part, shape in self.shapes.items():
            if part == "merge_layer.weight":
                yield part, torch.zeros(shape)
            elif part in ("shared_expert.gate_proj.weight", "shared_expert.up_proj.weight"):
                yield part, ffn[part.removeprefix("shared_expert.")][neurons]
            elif part != "shared_expert.down_proj.weight":
                yield part, self.fresh(layer, part)

    def measured(self):
        return {"neurons": self.config.shared_expert_intermediate_size}

    @classmethod
    def describe(cls, figures):
        return f"It kept {figures['neurons']} neurons."


@pytest.fixture(autouse=True)
def registered():
    before = dict(STRATEGIES)
    assert register_strategy(Halved) is Halved
    yield
    STRATEGIES.clear()
    STRATEGIES.update(before)


@pytest.fixture
def dense(tmp_path):
    return save_dense(tmp_path / "dense", torch.bfloat16)


def test_convert_and_verify(tmp_path, dense, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [f"--{name}={value}" for name, value in SIZES.items()]
    arguments = ("convert", "dense", "out", "--strategy", "halved", *flags, "--first_neuron", 7, "--no-in-order")
    assert run(capsys, monkeypatch, *arguments)[0] == 0
    old, new = (load_file(folder / "model.safetensors") for folder in (dense, tmp_path / "out"))
    kept = old["model.layers.1.mlp.up_proj.weight"][7:55].flip(0)
    assert torch.equal(new["model.layers.1.mlp.shared_expert.up_proj.weight"], kept)
    card = ModelCard.load(tmp_path / "out" / "README.md").text
    for words in (Halved.promise.text, Halved.untrained, "It kept 48 neurons.", "--first-neuron 7 --no-in-order"):
        assert words in card, words
    status, errors = run(capsys, monkeypatch, "verify", "dense", "out", "--max_tokens", 64)
    assert status == 0, errors
    verification = verify(dense, tmp_path / "out", max_tokens=64)
    assert verification.strategy == "halved"
    assert verification.broken_promises == []
    monkeypatch.setattr(Halved, "promise", Promise("", "", max_logit_difference=1e-6, max_perplexity_ratio=1e-6))
    assert "perplexity" in verification.broken_promises[0]


def test_plan(dense):
    planned = plan(dense, **SIZES)
    halved = planned.models[-1]
    assert halved.name == "halved"
    assert halved.sizes["shared_expert_intermediate_size"] == 48
    assert halved.peak_memory_bytes == 12_345_000_000
    assert "--strategy halved" in planned.commands["halved"]
    table = plan(dense, shared_expert_intermediate_size=96).table()
    assert "halved does not fit: --shared-expert-intermediate-size 96: strategy halved needs 48" in table


def test_help_and_choices():
    shown = " ".join(parser().format_help().split())
    for words in (Halved.summary, "halved: half of the dense FFN", "options of strategy halved", "--first-neuron N"):
        assert words in shown, words
    assert "calibrated,random,halved" in shown


def test_its_options_are_its_own(tmp_path, dense):
    with pytest.raises(UserError, match=r"--first-neuron 3: strategy exact has no such option"):
        convert(dense, tmp_path / "out", strategy="exact", first_neuron=3)
    with pytest.raises(UserError, match=r"--distillation-steps 3: strategy halved has no such option"):
        convert(dense, tmp_path / "out", strategy="halved", distillation_steps=3)
    with pytest.raises(TypeError, match="last_neuron"):
        convert(dense, tmp_path / "out", strategy="halved", last_neuron=3)
    assert not (tmp_path / "out").exists()


def test_a_name_is_taken_once_and_all_must_be_said():
    with pytest.raises(ValueError, match="'halved'"):
        register_strategy(type("Other", (Halved,), {}))
    register_strategy(Halved)
    with pytest.raises(TypeError, match="Silent has no name, summary, promise, untrained"):
        register_strategy(type("Silent", (ConversionStrategy,), {}))


def test_options_can_be_shared_by_strategies(dense):
    register_strategy(type("Again", (Halved,), {"name": "again"}))
    assert parser().format_help().count("--first-neuron N ") == 1


def test_a_tensor_that_is_not_made_is_named(tmp_path, dense, monkeypatch):
    monkeypatch.setattr(Halved, "layer", lambda self, layer, ffn: iter(()))
    with pytest.raises(NotImplementedError, match="strategy halved makes no head_layer"):
        convert(dense, tmp_path / "out", strategy="halved")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
