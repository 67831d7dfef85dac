"""PEFT on MH-MoE: what it adapts; adapters train, are saved, merged and evaluated; what cannot learn says so."""

import json
import subprocess
import sys

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from transformers import Trainer, TrainingArguments


peft = pytest.importorskip("peft")

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))


def adapted(model, **fields):
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **fields))


def train(model, steps: int = 6) -> list[float]:
    """Losses before each step."""
    model.train()
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], 1e-2)
    losses = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


CASES = {
    "defaults": ({}, {}),
    "all-linear": ({"shared_expert_intermediate_size": 32}, {"target_modules": "all-linear"}),
    "experts": ({}, {"target_modules": [], "target_parameters": EXPERTS}),
    "experts beside the defaults": ({}, {"target_parameters": EXPERTS}),
    "experts of two matrices": (
        {"gated_mlp": False},
        {"target_modules": [], "target_parameters": ["mlp.experts.up_proj", "mlp.experts.down_proj"]},
    ),
    "router": ({}, {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}),
    "router of X-MoE": (
        {"router_type": "xmoe"},
        {"target_modules": [], "target_parameters": ["mlp.gate.weight", "mlp.gate.projection"]},
    ),
    "whole router of X-MoE": ({"router_type": "xmoe"}, {"modules_to_save": ["gate"]}),
    "convolution": ({"token_split": "conv1d"}, {"target_modules": ["conv"]}),
    "BitNet's experts": ({"use_bitnet": True}, {"target_modules": [], "target_parameters": EXPERTS}),
    "BitNet's layers": ({"use_bitnet": True}, {"target_modules": [], "target_parameters": ["q_proj.weight"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_adapters_train_and_are_saved_and_merged(case, tmp_path):
    fields, options = CASES[case]
    model = adapted(tiny_model(**fields), **options)
    losses = train(model)
    assert losses[-1] < losses[0]
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_model(**fields), tmp_path).eval()
    assert torch.equal(logits(again), expected)
    merged = model.merge_and_unload()
    assert (logits(merged) - expected).abs().max() <= 2e-6


def test_every_backend_sees_adapters():
    model = adapted(tiny_model(), target_modules=[], target_parameters=EXPERTS)
    train(model)
    results = {}
    for implementation in ("eager", "subtoken"):
        model.base_model.model.set_experts_implementation(implementation)
        model.zero_grad()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        results[implementation] = [
            parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad
        ]
        assert all(grad.any() for grad in results[implementation])
    for actual, expected in zip(results["subtoken"], results["eager"], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def targets(model) -> set[str]:
    return {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "base_layer")}


def test_what_is_adapted():
    assert targets(adapted(tiny_model())) == {"q_proj", "v_proj"}
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "head_layer", "merge_layer", "gate_proj", "up_proj", "down_proj"}
    assert targets(adapted(tiny_model(shared_expert_intermediate_size=32), target_modules="all-linear")) == linear


@pytest.mark.parametrize("config", ["IA3Config", "LoHaConfig", "VeraConfig"])
def test_defaults_of_other_methods(config):
    model = peft.get_peft_model(tiny_model(), getattr(peft, config)(task_type="CAUSAL_LM"))
    assert model.get_nb_trainable_parameters()[0]


def test_defaults_are_there_whichever_is_imported_first():
    for imports in ("import mhmoe, peft.utils.constants as c", "import peft.utils.constants as c, mhmoe"):
        code = f"{imports}; print(c.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING['mhmoe'])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "['q_proj', 'v_proj']"


def test_peft_is_not_imported():
    code = "import sys, mhmoe; print('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_gradient_checkpointing():
    results = []
    for checkpointing in (False, True):
        model = adapted(tiny_model(), target_parameters=EXPERTS)
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        results.append(train(model))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=0)


def test_the_load_balancing_loss_reaches_an_adapted_router():
    for options in ({"modules_to_save": ["gate"]}, {"target_parameters": ["mlp.gate.weight"]}):
        model = adapted(tiny_model(output_router_logits=True, router_aux_loss_coef=1.0), **options)
        output = model(IDS, labels=IDS)
        plain = tiny_model(output_router_logits=True)(IDS, labels=IDS)
        assert len(output.router_logits) == 4  # of two layers, two heads each
        torch.testing.assert_close(output.aux_loss, plain.aux_loss)
        output.aux_loss.backward()
        grads = [parameter.grad for name, parameter in model.named_parameters() if ".gate." in name]
        assert any(grad is not None and grad.any() for grad in grads)


def test_adapters_beside_bitnet_are_refused():
    with pytest.raises(ValueError, match=r"use_bitnet=True .* target_parameters=\['q_proj.weight', ...\]"):
        adapted(tiny_model(use_bitnet=True))(IDS)


class TestZeroMergeLayer:
    """As a conversion with strategy "exact" starts."""

    @staticmethod
    def model():
        model = tiny_model(shared_expert_intermediate_size=32, head_merge_bias=True)
        for layer in model.model.layers:
            layer.mlp.merge_layer.weight.data.zero_()
        return model

    @pytest.mark.parametrize(
        ("options", "warns"),
        [
            ({"target_parameters": EXPERTS}, True),
            ({"target_modules": ["q_proj", "head_layer"]}, True),
            ({"modules_to_save": ["gate"]}, True),
            ({"target_parameters": EXPERTS, "bias": "all"}, True),  # what moves is no matrix
            ({}, False),
            ({"target_modules": "all-linear"}, False),
            ({"target_parameters": EXPERTS, "target_modules": ["merge_layer"]}, False),
            ({"target_parameters": EXPERTS, "modules_to_save": ["merge_layer"]}, False),
        ],
    )
    def test_adapters_that_it_cuts_off(self, options, warns, monkeypatch):
        told = []
        monkeypatch.setattr("mhmoe.modeling_mhmoe.zero_merge.logger.warning", told.append)
        model = self.model()
        model(IDS, labels=IDS).loss.backward()  # of the whole model, to which nothing is to be said
        model = adapted(model, **options)
        train(model, steps=2)
        assert len(told) == warns
        if warns:
            assert "merge_layer is zero and frozen in 2 of 2 MH-MoE layers" in told[0]
            assert "--strategy anchored" in told[0]
            assert "\n" not in told[0]

    def test_under_the_plain_trainer(self, tmp_path, monkeypatch):
        told = []
        monkeypatch.setattr("mhmoe.modeling_mhmoe.zero_merge.logger.warning", told.append)
        model = adapted(self.model(), target_modules=[], target_parameters=EXPERTS)
        arguments = TrainingArguments(tmp_path, max_steps=2, report_to="none", use_cpu=True, save_strategy="no")
        rows = [{"input_ids": row, "labels": row} for row in IDS]
        Trainer(model, arguments, train_dataset=rows).train()
        assert len(told) == 1

    def test_not_where_it_has_moved(self, monkeypatch):
        told = []
        monkeypatch.setattr("mhmoe.modeling_mhmoe.zero_merge.logger.warning", told.append)
        train(adapted(tiny_model(), target_parameters=EXPERTS), steps=1)
        assert not told


def test_evaluated_with_an_adapter(tmp_path):
    model = tiny_model(eos_token_id=2)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    adapter = adapted(model, target_parameters=EXPERTS)
    train(adapter, steps=20)
    adapter.save_pretrained(tmp_path / "adapter")
    adapter.merge_and_unload().save_pretrained(tmp_path / "merged")
    tiny_tokenizer().save_pretrained(tmp_path / "merged")
    scores = []
    for place in (["model", "--model_args", f"peft={tmp_path / 'adapter'}"], ["merged"]):
        command = [sys.executable, "-m", "mhmoe", "eval", *place, "--tasks", "mhmoe_smoke", "--limit", "4"]
        command += ["--output_path", str(tmp_path / f"results{len(scores)}"), "--log_samples"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "experts activated" in done.stdout
        samples = next((tmp_path / f"results{len(scores)}").rglob("samples*.jsonl")).read_text().splitlines()
        scores.append([response for row in samples for response in json.loads(row)["filtered_resps"]])
    with_adapter, merged = ([float(likelihood) for likelihood, _ in score] for score in scores)
    assert with_adapter == pytest.approx(merged, abs=1e-4)


def test_evaluated_behind_virtual_tokens(tmp_path):
    """Those of prompt tuning are fed to the model too, and do not count."""
    model = tiny_model(eos_token_id=2)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    counted = []
    for options in (["--model_args", f"peft={tmp_path / 'adapter'}"], []):
        command = [sys.executable, "-m", "mhmoe", "eval", str(tmp_path / "model"), *options, "--tasks", "mhmoe_smoke"]
        command += ["--limit", "3", "--batch_size", "4", "--output_path", str(tmp_path / f"results{len(counted)}")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "was not seen" not in done.stderr
        counted.append(
            [line.rstrip("|").rpartition("|")[2] for line in done.stdout.splitlines() if "mhmoe_smoke" in line]
        )
    assert counted[0] == counted[1]
