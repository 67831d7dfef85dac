"""Label smoothing: by plain Trainer, by MHMoETrainer, and by `mhmoe train`."""

import json
from pathlib import Path

import pytest
import torch
from one_step import random_rows
from tiny import perplexity_in_blocks, tiny_model, tiny_tokenizer
from transformers import Trainer, TrainingArguments
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from mhmoe import MHMoEForCausalLM
from mhmoe.modeling_mhmoe.load_balancing import z_loss
from mhmoe.training import MHMoETrainer
from mhmoe.training.train_command import main


FACTOR = 0.3


def smoothed(logits: torch.Tensor, labels: torch.Tensor, factor: float = FACTOR) -> list[torch.Tensor]:
    """Of every target, by its definition: (1 - factor) of its own -log p, and factor of the mean over all tokens."""
    losses = []
    for scores, targets in zip(logits.double().log_softmax(-1), labels, strict=True):
        for position in range(len(targets) - 1):
            if targets[position + 1] != -100:
                own, others = scores[position, targets[position + 1]], scores[position].mean()
                losses.append(-(1 - factor) * own - factor * others)
    return losses


def arguments(folder: Path, **given) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), label_smoothing_factor=FACTOR, use_cpu=True, report_to="none", **given
    )


def batch() -> dict[str, torch.Tensor]:
    rows = random_rows(0, 20)
    return {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}


@pytest.mark.parametrize("kind", ["package", "remote code"])
def test_plain_trainer_shifts_the_labels(kind, tmp_path):
    model = tiny_model()
    if kind == "remote code":
        model.save_pretrained(tmp_path)
        model = get_class_from_dynamic_module("modeling_mhmoe.MHMoEForCausalLM", tmp_path).from_pretrained(tmp_path)
        assert not isinstance(model, MHMoEForCausalLM)
    expected = smoothed(model(batch()["input_ids"]).logits, batch()["labels"])
    loss = Trainer(model=model, args=arguments(tmp_path)).compute_loss(model, batch())
    torch.testing.assert_close(loss.double(), sum(expected) / len(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("num_items_in_batch", [None, 100])
def test_own_trainer_keeps_the_losses_of_the_routers(num_items_in_batch, balance, tmp_path):
    model = tiny_model(router_aux_loss_coef=0.5, router_z_loss_coef=0.25).train()
    trainer = MHMoETrainer(model=model, args=arguments(tmp_path), balance=balance)
    step = {} if num_items_in_batch is None else {"num_items_in_batch": torch.tensor(num_items_in_batch)}
    loss = trainer.compute_loss(model, batch(), **step)
    gradients = torch.autograd.grad(loss, list(model.parameters()))

    outputs = model(batch()["input_ids"], output_router_logits=True)
    targets = smoothed(outputs.logits, batch()["labels"])
    expected = sum(targets) / (num_items_in_batch or len(targets))
    if balance:
        share = len(targets) / (num_items_in_batch or len(targets))
        expected = expected + share * (0.5 * outputs.aux_loss + 0.25 * z_loss(outputs.router_logits))
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-6, atol=0)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-7)
    with torch.no_grad():  # outside the trainer the model's loss is its own
        own = smoothed(outputs.logits, batch()["labels"], factor=0.0)
        torch.testing.assert_close(model(**batch()).loss.double(), sum(own) / len(own), rtol=1e-6, atol=0)


def test_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    model = tiny_model()
    model.save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    text = "It rained, and the cat looked at us. " * 8
    Path("text.txt").write_text(text)
    flags = "--train_file text.txt --validation_file text.txt --output_dir output --block_size 32 --max_steps 2"
    flags += f" --label_smoothing_factor {FACTOR} --learning_rate 1e-2 --disable_tqdm true --use_cpu true"
    main(["model", *flags.split()])
    first, *_, last = (
        entry
        for entry in json.loads(Path("output/trainer_state.json").read_text())["log_history"]
        if "eval_loss" in entry
    )
    ids = [*tiny_tokenizer()(text)["input_ids"], 2]
    blocks = torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)
    expected = smoothed(model(blocks).logits, blocks)
    assert first["eval_loss"] == pytest.approx((sum(expected) / len(expected)).item(), rel=1e-5)
    # the perplexity is of the text as it is
    assert first["eval_perplexity"] == pytest.approx(perplexity_in_blocks("model", ids, 32), rel=1e-5)
    assert last["eval_loss"] < first["eval_loss"]
