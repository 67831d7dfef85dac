"""RoutingCallback under plain Trainer."""

import json
import os
import subprocess
import sys

import pytest
import torch
from one_step import sgd_arguments
from paths import SUPPORT
from routing_logs import padded_rows, routing_logs
from tiny import tiny_model, tiny_sparse_moe
from transformers import Trainer, TrainerCallback

from mhmoe.evaluation import RoutingRecorder
from mhmoe.evaluation.routing import MODEL_TYPES
from mhmoe.training import RoutingCallback


FIGURES = ("experts_activated", "max_over_mean_load", "load_entropy")


def make(model_type: str) -> torch.nn.Module:
    return tiny_model(num_experts=24) if model_type == "mhmoe" else tiny_sparse_moe(model_type, num_experts=24)


def expected_figures(model: torch.nn.Module, rows: list[dict]) -> dict[str, float]:
    """Row by row without its padding, as summary() counts them."""
    with RoutingRecorder(model.eval(), None) as recorder, torch.no_grad():
        counts = recorder.new_counts()
        for row in rows:
            model(input_ids=row["input_ids"][None], attention_mask=row["attention_mask"][None])
            counts.add(recorder.chosen, row["attention_mask"][None])
    summary = counts.summary()
    values = (summary["share_activated"], summary["max_over_mean_load"], summary["entropy"])
    return dict(zip(FIGURES, values, strict=True))


def figures(entry: dict[str, float]) -> dict[str, float]:
    return {name: entry[name] for name in FIGURES}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_figures_of_every_kind_of_model(model_type, tmp_path):
    model = make(model_type)
    first, second = routing_logs(model, str(tmp_path))
    assert figures(first) == pytest.approx(expected_figures(model, padded_rows()[:2]))
    assert figures(second) == pytest.approx(expected_figures(model, padded_rows()[2:]))
    assert figures(first) != pytest.approx(figures(second))


@pytest.mark.parametrize("model_type", ["flex_olmo", "ernie4_5_moe"])
def test_figures_of_kinds_that_no_table_names(model_type, tmp_path):
    assert model_type not in MODEL_TYPES
    model = tiny_sparse_moe(model_type, num_experts=24)
    (entry,) = routing_logs(model, str(tmp_path), max_steps=1)
    assert figures(entry) == pytest.approx(expected_figures(model, padded_rows()[:2]))


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 1, "accumulate": 4, "max_steps": 1},
        {"logging_steps": 2},
        {"batch_size": 4, "max_steps": 1, "gradient_checkpointing": True},
        {
            "batch_size": 4,
            "max_steps": 1,
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
        {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True},
    ],
    ids=str,
)
def test_each_training_row_counts_once(arguments, tmp_path):
    model = tiny_model(num_experts=24)
    (logged,) = routing_logs(model, str(tmp_path), **arguments)
    assert figures(logged) == pytest.approx(expected_figures(model, padded_rows()))


def test_two_processes_log_what_all_of_them_reach(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = SUPPORT / "routing_logs.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, str(script), str(tmp_path / "logs.json")], check=True, env=environment, cwd=tmp_path)
    first, second = json.loads((tmp_path / "logs.json").read_text())
    model = tiny_model(num_experts=24)
    assert figures(first) == pytest.approx(expected_figures(model, padded_rows()[:2]))
    assert figures(second) == pytest.approx(expected_figures(model, padded_rows()[2:]))


class Reporter(TrainerCallback):
    """What Trainer's integrations with experiment trackers do."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_first_in_line_it_reaches_reporters_too(tmp_path):
    reporter = Reporter()
    arguments = sgd_arguments(str(tmp_path), 2, 1, max_steps=1, logging_steps=1)
    trainer = Trainer(model=tiny_model(), args=arguments, train_dataset=padded_rows(), callbacks=[reporter])
    trainer.callback_handler.callbacks.insert(0, RoutingCallback())
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in trainer.model.modules()]
    trainer.train()
    assert set(FIGURES) <= reporter.seen[0].keys()
    assert not set(FIGURES) & reporter.seen[-1].keys()  # of the end of the training
    # and the model is as it was
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in trainer.model.modules()]


def test_a_model_without_experts_is_named(tmp_path, caplog):
    (logged,) = routing_logs(tiny_model(mlp_only_layers=[0, 1]), str(tmp_path), max_steps=1)
    assert "MHMoEForCausalLM has no layers with experts" in caplog.text
    assert not set(FIGURES) & logged.keys()
