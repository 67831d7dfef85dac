"""Plain transformers.Trainer on MHMoEForCausalLM."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from one_step import FOUR, LAYOUTS, LEARNING_RATE, TWO_PROCESSES, UNEQUAL, random_rows, start_model, weights_after
from paths import SUPPORT
from safetensors.torch import load_file
from tiny import CHECKPOINTING, tiny_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from mhmoe import MHMoEForCausalLM
from mhmoe.modeling_mhmoe.modeling_mhmoe import MHMoESparseMoeBlock


TOLERANCE = 5e-6  # of how far the weights moved; float32 sums in another order


def distance(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], start: str = "plain") -> float:
    """How far `weights` are from `expected`, relative to how far the step moved them from the start."""
    names = weights.keys()
    start = start_model(start).state_dict()
    assert names == expected.keys() == start.keys()
    squares = [
        sum((weights[name].double() - other[name].double()).square().sum() for name in names)
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
def two_processes(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """The models that two processes end with in each of the steps of `TWO_PROCESSES`."""
    folder = tmp_path_factory.mktemp("two_processes")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run(
        [*launch, str(SUPPORT / "one_step.py"), str(folder)],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return {step: folder / str(number) for number, step in enumerate(TWO_PROCESSES)}


@pytest.mark.parametrize("rows", [FOUR, UNEQUAL])
def test_step_matches_its_definition(rows):
    assert distance(weights_after(rows, batch_size=4), reference_step([rows], pooled=False)) < TOLERANCE


def test_four_equal_micro_batches_move_the_weights_as_one():
    rows = FOUR[:2]
    weights = weights_after(rows * 4, batch_size=2, accumulate=4)
    assert distance(weights, weights_after(rows * 4, batch_size=8)) < TOLERANCE
    assert distance(weights, weights_after(rows, batch_size=2)) < TOLERANCE


def test_in_tree_loss_would_not():
    rows = FOUR[:2]
    single = weights_after(rows * 4, batch_size=8, start="in-tree loss")
    assert distance(single, weights_after(rows * 4, batch_size=8)) < TOLERANCE
    assert distance(weights_after(rows * 4, batch_size=2, accumulate=4, start="in-tree loss"), single) > 0.1


@pytest.mark.parametrize("rows", [FOUR, UNEQUAL])
def test_different_micro_batches_count_by_their_targets(rows):
    weights = weights_after(rows, batch_size=1, accumulate=4)
    assert distance(weights, reference_step([[row] for row in rows], pooled=False)) < TOLERANCE


def expected_weights(layout: str, step: str) -> dict[str, torch.Tensor]:
    """What one process makes of the same rows."""
    if step == "unequal targets" and "tensor" not in layout:
        return reference_step([UNEQUAL[:2], UNEQUAL[2:]], pooled=True)
    fields = TWO_PROCESSES[layout, step]
    return weights_after(fields["rows"], batch_size=4, start=fields.get("start", "plain"))


@pytest.mark.parametrize(("layout", "step"), [key for key in TWO_PROCESSES if key[1] != "in-tree loss"])
def test_two_processes_move_the_weights_as_one(two_processes, layout, step):
    weights = load_file(two_processes[layout, step] / "model.safetensors")
    start = TWO_PROCESSES[layout, step].get("start", "plain")
    assert distance(weights, expected_weights(layout, step), start) < TOLERANCE
    if start == "router biases":
        assert weights["model.layers.1.mlp.gate.e_score_correction_bias"].abs().max() == pytest.approx(0.01)


def test_two_processes_with_in_tree_loss_would_not(two_processes):
    weights = load_file(two_processes["copies", "in-tree loss"] / "model.safetensors")
    assert distance(weights, weights_after(FOUR, batch_size=4, start="in-tree loss")) > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_save_an_ordinary_folder(two_processes, layout):
    folder = two_processes[layout, "two micro-batches"]
    one = two_processes["copies", "one micro-batch"]
    assert {path.name for path in folder.iterdir()} == {path.name for path in one.iterdir()}
    assert (folder / "config.json").read_text() == (one / "config.json").read_text()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is MHMoEForCausalLM
    assert distance(model.state_dict(), expected_weights(layout, "two micro-batches")) < TOLERANCE


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


@pytest.mark.parametrize("arguments", [{}, {"bf16": True}, {CHECKPOINTING: True}])
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
    expected = weights_after(FOUR, batch_size=4)
    without = len(calls)
    weights = weights_after(FOUR, batch_size=4, **{CHECKPOINTING: True})
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
