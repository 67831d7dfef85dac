"""Learning from another model's logits: by MHMoETrainer, and by `mhmoe train --teacher`."""

import json
from pathlib import Path

import pytest
import torch
from one_step import random_rows
from tiny import save_dense, tiny_model, tiny_tokenizer
from training_runs import documents, options, write_jsonl
from transformers import AutoModelForCausalLM, TrainingArguments

from mhmoe.conversion import convert
from mhmoe.errors import UserError
from mhmoe.training import MHMoETrainer, Teacher
from mhmoe.training.train_command import main


WEIGHT, TEMPERATURE = 0.7, 2.0


def batch() -> dict[str, torch.Tensor]:
    rows = random_rows(0, 20)
    return {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}


def by_definition(student, teacher, labels, weight=WEIGHT) -> tuple[torch.Tensor, int]:
    """The sum over targets of (1 - w) (-log p) + w T^2 sum_v q_v (log q_v - log p_v), in float64, and their number."""
    total, number = torch.zeros((), dtype=torch.float64), 0
    for row, targets in enumerate(labels):
        for position in range(len(targets) - 1):
            if targets[position + 1] == -100:
                continue
            own = student[row, position].double()
            p, q = ((of / TEMPERATURE).softmax(-1) for of in (own, teacher[row, position].double()))
            divergence = sum(q[token] * (q[token].log() - p[token].log()) for token in range(len(q)))
            total = total - (1 - weight) * own.log_softmax(-1)[targets[position + 1]]
            total = total + weight * TEMPERATURE**2 * divergence
            number += 1
    return total, number


@pytest.mark.parametrize("kind", ["mhmoe", "dense"])
@pytest.mark.parametrize("num_items_in_batch", [None, 100])
@pytest.mark.parametrize("weight", [WEIGHT, 1.0])  # with all of it, the text's own loss is not made
def test_loss_and_gradients(weight, num_items_in_batch, kind, tmp_path):
    if kind == "mhmoe":
        model = tiny_model(router_aux_loss_coef=0.5).train()
    else:
        model = AutoModelForCausalLM.from_pretrained(save_dense(tmp_path / "dense"), dtype=torch.float32).train()
    teacher = Teacher(tiny_model(seed=1), weight, TEMPERATURE)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = MHMoETrainer(model=model, args=arguments, teacher=teacher)
    step = {} if num_items_in_batch is None else {"num_items_in_batch": torch.tensor(num_items_in_batch)}
    loss = trainer.compute_loss(model, batch(), **step)
    gradients = torch.autograd.grad(loss, list(model.parameters()))

    outputs = model(batch()["input_ids"], **({"output_router_logits": True} if kind == "mhmoe" else {}))
    total, targets = by_definition(
        outputs.logits, teacher.model(batch()["input_ids"]).logits, batch()["labels"], weight
    )
    expected = total / (num_items_in_batch or targets)
    if kind == "mhmoe":
        expected = expected + 0.5 * outputs.aux_loss * targets / (num_items_in_batch or targets)
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-6, atol=0)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-7)
    with torch.no_grad():  # an evaluation is of the text alone, and so is the model's own loss afterwards
        assert trainer.compute_loss(model.eval(), batch()) == model(**batch()).loss


def test_a_model_has_nothing_to_learn_from_itself():
    model, teacher = tiny_model().train(), Teacher(tiny_model(), weight=1.0)
    with teacher.teaching(model, batch()):
        loss = model(**batch()).loss
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert all(gradient.abs().max() < 1e-6 for gradient in torch.autograd.grad(loss, list(model.parameters())))


def test_shares_what_is_frozen_and_equal():
    student, teacher = tiny_model(), Teacher(tiny_model())
    student.model.embed_tokens.requires_grad_(False)
    student.model.norm.requires_grad_(False)
    with torch.no_grad():
        student.model.norm.weight += 1
    teacher.share_with(student)
    shared = [
        name
        for name, tensor in teacher.model.named_parameters()
        if tensor.data_ptr() == student.get_parameter(name).data_ptr()
    ]
    assert shared == ["model.embed_tokens.weight"]
    assert not any(tensor.requires_grad for tensor in teacher.model.parameters())


@pytest.fixture
def converted(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    save_dense(tmp_path / "dense")
    tiny_tokenizer().save_pretrained("dense")
    convert("dense", "model", num_moe_heads=4, num_experts=6, moe_intermediate_size=8, strategy="random")
    write_jsonl(Path("train.jsonl"), documents(60))
    Path("validation.txt").write_text(documents(1, words=300)[0])
    return tmp_path


@torch.no_grad()
def divergence(text: torch.Tensor) -> float:
    """Mean KL of the model in `output` from the one in `dense`."""
    logits = [AutoModelForCausalLM.from_pretrained(folder)(text).logits for folder in ("output", "dense")]
    student, teacher = (both.double().log_softmax(-1) for both in logits)
    return (teacher.exp() * (teacher - student)).sum(-1).mean().item()


def test_command(converted):
    """The same steps with a teacher end nearer to it than without, and the card says what was done."""
    text = torch.tensor([tiny_tokenizer()(documents(1)[0])["input_ids"]])
    flags = {"learning_rate": 3e-3, "max_steps": 12}
    main(options(**flags))
    alone = divergence(text)
    assert "Distilled" not in Path("output/README.md").read_text()
    main(options("--overwrite", "--teacher", "dense", "--distillation_weight", "1", **flags))
    taught = divergence(text)
    assert taught < 0.9 * alone
    card = Path("output/README.md").read_text()
    assert "Distilled from `dense`: 1 of the loss is the divergence from its logits at temperature 1." in card
    assert "teacher" not in json.loads(Path("output/config.json").read_text())


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"teacher": "nowhere"}, "nowhere"),
        ({"teacher": "dense", "distillation_weight": 0}, "distillation_weight=0 must be above 0 and at most 1"),
        ({"teacher": "dense", "distillation_weight": 1.5}, "distillation_weight=1.5"),
        ({"teacher": "dense", "distillation_temperature": 0}, "distillation_temperature=0"),
        ({"teacher": "other"}, "teacher=other: its tokens are not those of the model"),
        ({"teacher": "wide"}, "teacher=wide: has 136 logits for a token, the model 128"),
    ],
)
def test_mistakes(converted, flags, named):
    if flags["teacher"] == "other":
        tiny_model().save_pretrained("other")
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["cat"])
        tokenizer.save_pretrained("other")
    if flags["teacher"] == "wide":
        tiny_model(vocab_size=136).save_pretrained("wide")
        tiny_tokenizer().save_pretrained("wide")
    with pytest.raises(UserError, match=named) as mistake:
        main(options(**flags))
    assert "\n" not in str(mistake.value)
    assert not Path("output").exists()
