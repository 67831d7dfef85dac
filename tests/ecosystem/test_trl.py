"""TRL's SFT, DPO and GRPO trainers on MHMoEForCausalLM, without any options for it."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny import tiny_model, tiny_tokenizer
from transformers.models.mixtral import modeling_mixtral

from mhmoe import MHMoEForCausalLM
from mhmoe.modeling_mhmoe.load_balancing import load_balancing_loss
from mhmoe.training import RouterBiasCallback, RoutingCallback
from mhmoe.training.routing_callback import RoutingStatistics


pytest.importorskip("trl")
pytest.importorskip("peft")

from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer


SENTENCES = ["a cat", "the rain fell on us", "it looked at a mat and sat", "outside"]
KINDS = ("sft", "dpo", "grpo")


def folder_with_model(folder: Path, **fields) -> str:
    model = tiny_model(**{"router_aux_loss_coef": 0.5, "num_experts": 12, **fields})
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def letters(completions: list[str], **kwargs) -> list[float]:
    return [float(completion.count("a")) for completion in completions]


def make(kind: str, folder: Path, model, callbacks=(), **given):
    """A trainer for one step of two rows, which logs it."""
    arguments = {
        "output_dir": str(folder / "trainer"),
        "per_device_train_batch_size": 4 if kind == "grpo" else 2,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        **({"max_completion_length": 6, "num_generations": 2} if kind == "grpo" else {}),
        **given,
    }
    # made here: a config's text, by which a test would be named, differs between two processes of pytest
    lora = arguments.pop("lora", None)
    peft_config = None if lora is None else LoraConfig(target_modules=lora)
    rows = {
        "sft": {"text": SENTENCES},
        "dpo": {"prompt": SENTENCES, "chosen": SENTENCES[::-1], "rejected": [text[::-1] for text in SENTENCES]},
        "grpo": {"prompt": SENTENCES},
    }[kind]
    trainer, config = {
        "sft": (SFTTrainer, SFTConfig),
        "dpo": (DPOTrainer, DPOConfig),
        "grpo": (GRPOTrainer, GRPOConfig),
    }[kind]
    return trainer(
        model=model,
        args=config(**arguments),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
        callbacks=list(callbacks),
        **({"reward_funcs": letters} if kind == "grpo" else {}),
    )


@pytest.fixture
def aux_losses(monkeypatch) -> list[tuple]:
    """Every call that TRL makes of transformers' load balancing loss: router logits, mask, and what came of it."""
    calls, theirs = [], modeling_mixtral.load_balancing_loss_func

    def recorded(router_logits, num_experts, num_experts_per_tok, attention_mask=None):
        loss = theirs(router_logits, num_experts, num_experts_per_tok, attention_mask)
        calls.append((router_logits, attention_mask, loss))
        return loss

    monkeypatch.setattr(modeling_mixtral, "load_balancing_loss_func", recorded)
    return calls


def logged(trainer) -> dict[str, float]:
    (entry,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    return entry


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        *((kind, {}) for kind in KINDS),
        *((kind, {"lora": ["q_proj", "v_proj"]}) for kind in KINDS),
        *((kind, {"gradient_checkpointing": False}) for kind in KINDS),
        ("sft", {"packing": True, "max_length": 32}),
        ("sft", {"packing": True, "packing_strategy": "wrapped", "max_length": 16}),
        ("sft", {"gradient_accumulation_steps": 2}),
        ("sft", {"lora": "all-linear"}),
        ("dpo", {"precompute_ref_log_probs": True}),
        ("grpo", {"beta": 0.1}),
    ],
    ids=str,
)
def test_a_step_with_our_auxiliary_loss(kind, arguments, tmp_path, aux_losses):
    trainer = make(kind, tmp_path, folder_with_model(tmp_path / "model"), **arguments)
    trainable = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    before = {name: weight.detach().clone() for name, weight in trainable.items()}
    trainer.train()
    assert aux_losses
    for router_logits, mask, loss in aux_losses:
        torch.testing.assert_close(loss, load_balancing_loss(router_logits, 2, mask), rtol=1e-6, atol=0)
    assert any(mask is not None and not mask.all() for _, mask, _ in aux_losses) or "packing" in arguments
    assert logged(trainer)["aux_loss"] == pytest.approx(sum(loss.item() for *_, loss in aux_losses) / len(aux_losses))
    assert all(torch.isfinite(weight).all() for weight in trainable.values())
    moved = [name for name, weight in trainable.items() if not torch.equal(weight, before[name])]
    assert any("lora" in name for name in moved) if "lora" in arguments else any("gate" in name for name in moved)


@pytest.mark.parametrize("num_moe_heads", [1, 2, 4])
@pytest.mark.parametrize("arguments", [{}, {"packing": True, "max_length": 32}], ids=str)
def test_the_loss_of_sft_is_the_model_s(num_moe_heads, arguments, tmp_path):
    model = tiny_model(router_aux_loss_coef=0.5, num_moe_heads=num_moe_heads)
    trainer = make("sft", tmp_path, model, **arguments)
    batch = next(iter(trainer.get_train_dataloader()))
    assert ("attention_mask" in batch) != ("packing" in arguments)
    loss = trainer.compute_loss(model.train(), dict(batch))
    expected = model(**batch, output_router_logits=True)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=0)
    assert (expected.loss - model(**batch, output_router_logits=False).loss).abs() > 0.1


@pytest.mark.parametrize("fields", [{}, {"mlp_only_layers": [0, 1]}], ids=["sparse", "dense"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_coefficient_is_trl_s(kind, fields, tmp_path, aux_losses):
    trainer = make(kind, tmp_path, folder_with_model(tmp_path / "model", **fields), router_aux_loss_coef=0.0)
    trainer.train()
    assert not aux_losses
    assert "aux_loss" not in logged(trainer)


def test_dpo_has_a_reference_of_the_same_class(tmp_path):
    trainer = make("dpo", tmp_path, folder_with_model(tmp_path / "model"))
    assert isinstance(trainer.ref_model, MHMoEForCausalLM)
    assert not trainer.ref_model.training


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"router_z_loss_coef": 0.1}, "router_z_loss_coef=0.1"),
        ({"router_type": "xmoe", "scoring_func": "sigmoid"}, "scoring_func='sigmoid'"),
        ({"router_bias_update_rate": 0.1}, "biases"),
        ({"private_experts": True}, "private_experts=True"),
        ({}, None),
    ],
    ids=str,
)
def test_other_losses_of_routers_are_warned_of_once(fields, named, tmp_path, caplog):
    make("sft", tmp_path, tiny_model(**fields), max_steps=3).train()
    warnings = [
        record.getMessage() for record in caplog.records if "is not this model's output" in record.getMessage()
    ]
    assert len(warnings) == (named is not None)
    assert all(named in warning for warning in warnings)


@pytest.mark.parametrize("lora", [None, ["q_proj"]], ids=["full", "LoRA"])
@pytest.mark.parametrize("kind", KINDS)
def test_routing_callback(kind, lora, tmp_path, aux_losses, monkeypatch):
    """It counts the rows of the training forward alone: not those of a reference model, nor of generation."""
    counted, figures = [], RoutingStatistics.figures

    def recorded(self, device):
        counted.append(self._counts.num_tokens)
        return figures(self, device)

    monkeypatch.setattr(RoutingStatistics, "figures", recorded)
    folder = folder_with_model(tmp_path / "model")
    trainer = make(kind, tmp_path, folder, [RoutingCallback()], lora=lora, learning_rate=0.0)
    trainer.train()
    masks = [mask for _, mask, _ in aux_losses]
    assert counted[0] == sum(int(mask.sum()) for mask in masks)
    chosen = torch.zeros(2, 12)
    for router_logits, mask, _ in aux_losses:
        for entry, logits in enumerate(router_logits):
            rows = logits[mask.flatten().bool()].topk(2).indices.flatten()
            chosen[entry // 2] += rows.bincount(minlength=12)
    assert logged(trainer)["experts_activated"] == pytest.approx(chosen.gt(0).float().mean().item())
    assert logged(trainer)["max_over_mean_load"] == pytest.approx((chosen.amax(1) / chosen.mean(1)).max().item())
    assert 0 < logged(trainer)["load_entropy"] < 1
    assert logged(trainer)["entropy"] != logged(trainer)["load_entropy"]


@pytest.mark.parametrize("kind", KINDS)
def test_biases_follow_with_their_callback(kind, tmp_path):
    model = folder_with_model(tmp_path / "model", router_bias_update_rate=0.25)
    trainer = make(kind, tmp_path, model, [RouterBiasCallback()], router_aux_loss_coef=0.0)
    trainer.train()
    bias = trainer.model.model.layers[0].mlp.gate.e_score_correction_bias
    assert set(bias.abs().tolist()) <= {0.0, 0.25}
    assert bias.any()
