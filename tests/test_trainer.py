"""Plain transformers.Trainer on MHMoEForCausalLM."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from one_step import FOUR, LEARNING_RATE, TWO_PROCESSES, UNEQUAL, one_step, random_rows, start_model
from safetensors.torch import load_file
from tiny import tiny_model
from transformers import Trainer, TrainingArguments

from mhmoe.modeling_mhmoe.modeling_mhmoe import MHMoESparseMoeBlock


TOLERANCE = 5e-6  # of how far the weights moved; float32 sums in another order


def distance(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """How far `weights` are from `expected`, relative to how far the step moved them from the start."""
    start = dict(start_model().named_parameters())
    squares = [
        sum((weights[name].double() - other[name].double()).square().sum() for name in start)
        for other in (expected, start)
    ]
    return (squares[0] / squares[1]).sqrt().item()


def reference_step(micro_batches: list[list[dict]], pooled: bool) -> dict[str, torch.Tensor]:
    """
    The step by its definition: cross entropy over all targets, and the load balancing loss of every micro-batch, each
    with its share of the targets. `pooled`: they know the experts' shares of all micro-batches, as processes do.
    """
    model = start_model()
    config = model.config
    targets = [sum((row["labels"][1:] != -100).sum() for row in rows) for rows in micro_batches]
    cross_entropies, routed, probabilities = [], [], []
    for rows in micro_batches:
        batch = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}
        outputs = model(input_ids=batch["input_ids"], output_router_logits=True)
        cross_entropies.append(
            torch.nn.functional.cross_entropy(
                outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
            )
        )
        router_logits = torch.cat(outputs.router_logits)
        chosen = router_logits.topk(config.num_experts_per_tok).indices.flatten()
        routed.append(chosen.bincount(minlength=config.num_experts) / len(router_logits))
        probabilities.append(router_logits.softmax(-1).mean(0))
    if pooled:
        routed = [torch.stack(routed).mean(0)] * len(routed)
    balance = [
        number / sum(targets) * config.num_experts * (share * probability).sum()
        for number, share, probability in zip(targets, routed, probabilities, strict=True)
    ]
    (sum(cross_entropies) / sum(targets) + config.router_aux_loss_coef * sum(balance)).backward()
    return {name: weight.detach() - LEARNING_RATE * weight.grad for name, weight in model.named_parameters()}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    """The weights that two processes end with in each of the steps of `TWO_PROCESSES`."""
    folder = tmp_path_factory.mktemp("two_processes")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run(
        [*launch, str(Path(__file__).with_name("one_step.py")), str(folder)],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return {step: load_file(folder / f"{number}.safetensors") for number, step in enumerate(TWO_PROCESSES)}


@pytest.mark.parametrize("rows", [FOUR, UNEQUAL])
def test_step_matches_its_definition(rows):
    assert distance(one_step(rows, batch_size=4), reference_step([rows], pooled=False)) < TOLERANCE


def test_four_equal_micro_batches_move_the_weights_as_one():
    rows = FOUR[:2]
    weights = one_step(rows * 4, batch_size=2, accumulate=4)
    assert distance(weights, one_step(rows * 4, batch_size=8)) < TOLERANCE
    assert distance(weights, one_step(rows, batch_size=2)) < TOLERANCE


def test_in_tree_loss_would_not():
    rows = FOUR[:2]
    single = one_step(rows * 4, batch_size=8, in_tree_loss=True)
    assert distance(single, one_step(rows * 4, batch_size=8)) < TOLERANCE
    assert distance(one_step(rows * 4, batch_size=2, accumulate=4, in_tree_loss=True), single) > 0.1


@pytest.mark.parametrize("rows", [FOUR, UNEQUAL])
def test_different_micro_batches_count_by_their_targets(rows):
    weights = one_step(rows, batch_size=1, accumulate=4)
    assert distance(weights, reference_step([[row] for row in rows], pooled=False)) < TOLERANCE


@pytest.mark.parametrize("step", ["one micro-batch", "two micro-batches", "tokens counted by each process"])
def test_two_processes_move_the_weights_as_one(two_processes, step):
    whole = one_step(TWO_PROCESSES[step]["rows"], batch_size=4)
    assert distance(two_processes[step], whole) < TOLERANCE


def test_two_processes_count_by_their_targets(two_processes):
    expected = reference_step([UNEQUAL[:2], UNEQUAL[2:]], pooled=True)
    assert distance(two_processes["unequal targets"], expected) < TOLERANCE


def test_two_processes_with_in_tree_loss_would_not(two_processes):
    assert distance(two_processes["in-tree loss"], one_step(FOUR, batch_size=4, in_tree_loss=True)) > 0.1


def trainer(output_dir: Path, **arguments) -> Trainer:
    """Six steps of AdamW over eight rows in random order, with dropout in the attention."""
    fields = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    training_args = TrainingArguments(output_dir=str(output_dir), **{**fields, **arguments})
    model = tiny_model(output_router_logits=True, attention_dropout=0.1)
    return Trainer(model=model, args=training_args, train_dataset=random_rows(*[0] * 8))


@pytest.mark.parametrize("arguments", [{}, {"bf16": True}, {"activation_checkpointing": True}])
def test_loss_falls(tmp_path, arguments):
    run = trainer(tmp_path, **arguments)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert {weight.dtype for weight in run.model.parameters()} == {torch.float32}


def test_activation_checkpointing_takes_the_same_step(monkeypatch):
    forward, calls = MHMoESparseMoeBlock.forward, []

    def counted_forward(self, *args, **kwargs):
        calls.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(MHMoESparseMoeBlock, "forward", counted_forward)
    expected = one_step(FOUR, batch_size=4)
    without = len(calls)
    weights = one_step(FOUR, batch_size=4, activation_checkpointing=True)
    assert len(calls) == 3 * without  # every layer was computed again for the backward pass
    assert distance(weights, expected) < TOLERANCE


def test_resumed_run_ends_where_an_undisturbed_one_does(tmp_path):
    undisturbed = trainer(tmp_path / "undisturbed")
    undisturbed.train()
    trainer(tmp_path / "resumed", save_strategy="steps", save_steps=3).train()
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    for (name, weight), expected in zip(resumed.model.named_parameters(), undisturbed.model.parameters(), strict=True):
        assert torch.equal(weight, expected), name
