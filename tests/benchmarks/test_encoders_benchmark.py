"""The benchmark of small encoders compares what it says it compares."""

import importlib.util
from math import exp, log

import pytest
import torch
from paths import ROOT

import mhmoe
from mhmoe.encoders.costs import encoder_costs, on_meta


BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def encoders():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        spec = importlib.util.spec_from_file_location("encoders_benchmark", BENCHMARKS / "encoders.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def test_multiply_adds_are_equal_and_the_sparse_ones_parameters_too(encoders):
    counted = {
        kind: encoder_costs(on_meta(mhmoe.MHMoEViTModel, mhmoe.MHMoEViTConfig(**encoders.ENCODER, **moe)))
        for kind, moe in encoders.models().items()
    }
    assert len({costs.ffn_multiply_adds for costs in counted.values()}) == 1
    # but for whole eights of experts
    assert counted["MH-MoE"].ffn_parameters == pytest.approx(counted["SMoE"].ffn_parameters, rel=0.03)


class Predictions:
    predictions = torch.tensor([[[9.0, 9.0, 9.0], [0.0, log(3.0), 0.0]]]).numpy()
    label_ids = torch.tensor([[-100, 1]]).numpy()


def test_perplexity_is_that_of_masked_words(encoders):
    assert encoders.perplexity(Predictions)["perplexity"] == pytest.approx(exp(-log(3 / 5)))


def test_the_table_has_mean_and_standard_deviation_of_the_seeds(encoders):
    row = {"model": "dense", "ffn_multiply_adds": 1000, "parameters": 2000, "steps": 30}
    rows = [
        *({**row, "task": "digits", "seed": seed, "accuracy": value} for seed, value in enumerate((0.9, 0.92, 0.94))),
        {**row, "task": "easy-vqa-masked", "seed": 0, "perplexity": 1.5},
    ]
    of_digits, of_masked = encoders.table(rows).splitlines()[2:]
    assert of_digits == "| digits | dense | 1,000 | 2,000 | 30 | 3 | accuracy 92.0% ± 2.0 |"
    assert of_masked.endswith("| 1 | perplexity 1.500 |")
