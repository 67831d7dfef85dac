"""The benchmark of small encoders compares what it says it compares."""

from math import exp, log

import pytest
import torch
from benchmark_scripts import load_benchmark

import mhmoe
from mhmoe.encoders.costs import encoder_costs, on_meta


@pytest.fixture(scope="module")
def encoders():
    return load_benchmark("encoders")


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
