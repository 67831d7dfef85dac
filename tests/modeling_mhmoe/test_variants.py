"""What the variants of the layer promise beside its numbers: structure, start, plans, saving, training."""

from pathlib import Path

import pytest
import torch
from tiny import plan_names, tiny_config, tiny_model
from transformers import AutoModel, AutoModelForCausalLM

from mhmoe import MHMoEConfig, MHMoEForCausalLM, MHMoEModel


VARIANTS = {
    "two matrices": {"gated_mlp": False, "shared_expert_intermediate_size": 16, "mlp_only_layers": [0]},
    "no layers": {"head_layer_depth": 0, "merge_layer_depth": 0},
    "deep layers": {"head_layer_depth": 2, "merge_layer_depth": 3, "head_merge_bias": True},
    "layers on one head": {"num_moe_heads": 1, "head_layer_depth": 1, "merge_layer_depth": 1},
    "xavier": {"head_merge_init": "xavier", "head_merge_bias": True},
    "conv1d": {"token_split": "conv1d", "conv_kernel_size": 5, "head_merge_bias": True, "head_merge_init": "xavier"},
    "residual": {"sub_token_residual": True},
    "xmoe": {"router_type": "xmoe"},
    "xmoe, one head, sigmoid": {"router_type": "xmoe", "num_moe_heads": 1, "scoring_func": "sigmoid"},
    "bias": {"router_bias_update_rate": 0.01},
    "private experts": {"private_experts": True, "router_bias_update_rate": 0.01},
    "router of tokens": {"router_input": "token"},
    "LatentMoE": {
        "num_moe_heads": 1,
        "moe_latent_size": 16,
        "router_input": "token",
        "shared_expert_intermediate_size": 16,
        "head_merge_init": "xavier",
    },
    "all of the family": {
        "num_moe_heads": 4,
        "experts_type": "two_matrix",
        "private_experts": True,
        "router_input": "latent",
        "moe_latent_size": 32,
        "head_layer_depth": 2,
        "head_merge_bias": True,
    },
    "P1": {
        "num_moe_heads": 4,
        "gated_mlp": False,
        "hidden_act": "relu",
        "router_type": "xmoe",
        "head_merge_bias": True,
        "head_merge_init": "xavier",
        "sub_token_residual": True,
        "router_bias_update_rate": 0.01,
        "router_z_loss_coef": 0.001,
    },
}
each_variant = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)


def random_ids(batch: int = 2, tokens: int = 10) -> torch.Tensor:
    return torch.randint(3, 128, (batch, tokens), generator=torch.Generator().manual_seed(0))


def shapes(model: torch.nn.Module, layer: int = 1) -> dict[str, tuple[int, ...]]:
    prefix = f"model.layers.{layer}.mlp."
    return {
        name.removeprefix(prefix): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name.startswith(prefix)
    }


LINEAR = {"head_layer.weight": (48, 48), "merge_layer.weight": (48, 48)}
EXPERTS = {"experts.gate_up_proj": (6, 32, 24), "experts.down_proj": (6, 24, 16)}
GATE = {"gate.weight": (6, 24)}


class TestStructure:
    def test_two_matrices(self):
        model = tiny_model(**VARIANTS["two matrices"], mlp_bias=True)
        biases = {"up_proj.bias": (64,), "down_proj.bias": (48,)}
        assert shapes(model, 0) == {"up_proj.weight": (64, 48), "down_proj.weight": (48, 64), **biases}
        shared = {
            "up_proj.weight": (16, 48),
            "down_proj.weight": (48, 16),
            "up_proj.bias": (16,),
            "down_proj.bias": (48,),
        }
        assert shapes(model) == LINEAR | GATE | {
            "experts.up_proj": (6, 16, 24),
            "experts.down_proj": (6, 24, 16),
            **{f"shared_expert.{name}": shape for name, shape in shared.items()},
        }

    def test_head_and_merge_layers(self):
        assert shapes(tiny_model(head_layer_depth=0)) == {"merge_layer.weight": (48, 48)} | GATE | EXPERTS
        assert shapes(tiny_model(**VARIANTS["no layers"])) == GATE | EXPERTS
        deep = {
            f"{layer}.{number}.{part}": (48, 48) if part == "weight" else (48,)
            for layer, numbers in (("head_layer", (0, 2)), ("merge_layer", (0, 2, 4)))
            for number in numbers
            for part in ("weight", "bias")
        }
        assert shapes(tiny_model(**VARIANTS["deep layers"])) == deep | GATE | EXPERTS
        assert shapes(tiny_model(**VARIANTS["layers on one head"])).keys() == {*LINEAR, *GATE, *EXPERTS}

    def test_conv1d(self):
        assert shapes(tiny_model(token_split="conv1d", num_moe_heads=4)).pop("head_layer.conv.weight") == (4, 1, 4)
        names = shapes(tiny_model(**VARIANTS["conv1d"])).keys()
        assert {name for name in names if name.startswith("head")} == {
            "head_layer.conv.weight",
            "head_layer.conv.bias",
        }

    @pytest.mark.parametrize(("heads", "width"), [(1, 16), (2, 8), (3, 5), (24, 1)])
    def test_xmoe_projects_to_16_numbers_a_token(self, heads, width):
        model = tiny_model(router_type="xmoe", num_moe_heads=heads)
        gate = {name: shape for name, shape in shapes(model).items() if name.startswith("gate")}
        assert gate == {
            "gate.projection": (width, 48 // heads),
            "gate.weight": (6, width),
            "gate.log_temperature": (1,),
        }

    def test_family(self):
        assert shapes(tiny_model(**VARIANTS["private experts"])) == {
            **LINEAR,
            "gate.weight": (12, 24),
            "gate.e_score_correction_bias": (12,),
            "experts.gate_up_proj": (12, 32, 24),
            "experts.down_proj": (12, 24, 16),
        }
        assert shapes(tiny_model(**VARIANTS["router of tokens"])) == {**LINEAR, **EXPERTS, "gate.weight": (12, 48)}
        latent = shapes(tiny_model(**VARIANTS["LatentMoE"]))
        assert latent.pop("shared_expert.gate_proj.weight") == (16, 48)
        assert {name: shape for name, shape in latent.items() if not name.startswith("shared")} == {
            "head_layer.weight": (16, 48),
            "merge_layer.weight": (48, 16),
            "gate.weight": (6, 48),
            "experts.gate_up_proj": (6, 32, 16),
            "experts.down_proj": (6, 16, 16),
        }
        every = shapes(tiny_model(**VARIANTS["all of the family"]))
        assert (every["head_layer.0.weight"], every["head_layer.2.weight"]) == ((32, 48), (32, 32))
        assert every["gate.weight"] == (24, 32)
        assert every["experts.up_proj"] == (24, 16, 8)

    @each_variant
    def test_one_router_class_for_all_that_look_for_one(self, fields):
        outputs = tiny_model(**fields)(random_ids(), output_router_logits=True)
        layers, heads = 2 - len(fields.get("mlp_only_layers", [])), fields.get("num_moe_heads", 2)
        assert [tuple(logits.shape) for logits in outputs.router_logits] == [(20, 6)] * heads * layers


class TestStart:
    def test_xavier(self):
        torch.manual_seed(0)
        model = MHMoEForCausalLM(tiny_config(hidden_size=192, num_moe_heads=4, **VARIANTS["xavier"]))
        block = model.model.layers[0].mlp
        for layer, gain in ((block.head_layer, 2**-0.5), (block.merge_layer, 1.0)):
            bound = gain * (6 / (2 * 192)) ** 0.5
            assert bound * 0.99 < layer.weight.abs().max() <= bound
            assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
            assert not layer.bias.any()
        assert block.experts.gate_up_proj.std().item() == pytest.approx(0.02, rel=0.05)
        assert model.model.layers[0].self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)

    def test_normal(self):
        torch.manual_seed(0)
        block = MHMoEForCausalLM(tiny_config(head_layer_depth=2)).model.layers[0].mlp
        assert block.head_layer[0].weight.std().item() == pytest.approx(0.02, rel=0.1)

    @each_variant
    def test_same_seed_same_model_and_nothing_left_empty(self, fields):
        model, again = tiny_model(**fields), tiny_model(**fields)
        for (name, tensor), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
            assert torch.equal(tensor, other), name
            if name.endswith((".bias", "_bias", "log_temperature")):
                assert not tensor.any(), name
            else:
                assert tensor.std() > 1e-3 or "norm" in name, name


class TestPlans:
    @each_variant
    def test_rules_are_of_the_modules_that_are_there(self, fields):
        config = tiny_config(**fields)
        model = MHMoEModel(config)
        names = plan_names(model)
        assert set(config.base_model_tp_plan) <= names
        assert set(config.base_model_ep_plan) <= names
        planned = {name.removesuffix(".weight") for name in names if name.endswith(("_proj", "_proj.weight"))}
        assert planned == {rule for rule in config.base_model_tp_plan if rule.endswith("_proj")}
        experts = {name for name in planned if ".experts." in name} | {"layers.*.mlp.experts"}
        router = {"layers.*.mlp.gate"}  # whose rule is of transformers before 5.19
        assert set(config.base_model_ep_plan) - router == experts


class TestSaving:
    @each_variant
    def test_round_trip(self, fields, tmp_path: Path):
        model = tiny_model(**fields)
        for name, tensor in model.state_dict().items():
            if name.endswith(("bias", "log_temperature")):  # which start at zero, and would hide a lost one
                torch.nn.init.normal_(tensor, std=0.1)
        model.save_pretrained(tmp_path)
        for auto_class in (AutoModelForCausalLM, AutoModel):
            loaded, loading = auto_class.from_pretrained(tmp_path, output_loading_info=True)
            assert not loading["missing_keys"]
            assert not loading["mismatched_keys"]
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        expected = model.state_dict()
        assert loaded.state_dict().keys() == expected.keys()
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
        for field, value in fields.items():
            assert getattr(MHMoEConfig.from_pretrained(tmp_path), field) == value
        with torch.no_grad():
            torch.testing.assert_close(loaded(random_ids()).logits, model(random_ids()).logits)


class TestTraining:
    @each_variant
    def test_every_weight_learns_with_and_without_checkpointing(self, fields):
        model = tiny_model(**fields).train()
        inputs = {"input_ids": random_ids(4), "labels": random_ids(4), "output_router_logits": True}

        def gradients() -> dict[str, torch.Tensor]:
            model.zero_grad()
            model(**inputs).loss.backward()
            return {name: parameter.grad for name, parameter in model.named_parameters()}

        expected = gradients()
        model.gradient_checkpointing_enable()
        for name, gradient in gradients().items():
            assert gradient.any(), name
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @each_variant
    def test_low_precision(self, fields, dtype):
        model = tiny_model(**fields).to(dtype)
        outputs = model(random_ids(), labels=random_ids(), output_router_logits=True)
        outputs.loss.backward()
        assert outputs.logits.dtype == dtype
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())

    @pytest.mark.parametrize("name", ["conv1d", "P1", "all of the family", "private experts"])
    def test_compiled_in_one_graph(self, name):
        model = tiny_model(
            **{**VARIANTS[name], "num_hidden_layers": 1, "mlp_only_layers": []}, experts_implementation="batched_mm"
        ).train()
        inputs = {"input_ids": random_ids(), "labels": random_ids(), "output_router_logits": True}
        expected = model(**inputs)
        torch._dynamo.reset()  # which counts all the models of this function together
        outputs = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)
        torch.testing.assert_close(outputs.loss, expected.loss)
        outputs.loss.backward()


class TestXMoE:
    def test_zero_vectors(self):
        model = tiny_model(router_type="xmoe")
        gate = model.model.layers[0].mlp.gate
        sub_tokens = torch.zeros(3, 24, requires_grad=True)
        logits, weights, _ = gate(sub_tokens)
        assert not logits.any()
        weights.sum().backward()
        assert sub_tokens.grad.isfinite().all()
        torch.nn.init.zeros_(gate.weight)
        logits, weights, _ = gate(torch.randn(3, 24))
        weights.sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in gate.parameters())

    def test_logits_are_cosines_over_the_temperature(self):
        gate = tiny_model(router_type="xmoe", router_temperature=0.5).model.layers[0].mlp.gate
        sub_tokens = torch.randn(200, 24, generator=torch.Generator().manual_seed(0))
        logits = gate(sub_tokens)[0]
        assert logits.abs().max() <= 2
        torch.testing.assert_close(gate(1000 * sub_tokens)[0], logits)
        gate.log_temperature.data += 100  # a step far too large: the temperature is positive still
        assert gate.temperature > 0
        gate.log_temperature.data -= 150
        assert gate.temperature > 0

    @pytest.mark.parametrize(("scoring_func", "temperature"), [("softmax", 0.3), ("sigmoid", 0.07)])
    def test_start_of_the_temperature(self, scoring_func, temperature):
        model = tiny_model(router_type="xmoe", scoring_func=scoring_func)
        assert model.model.layers[0].mlp.gate.temperature.item() == pytest.approx(temperature)
