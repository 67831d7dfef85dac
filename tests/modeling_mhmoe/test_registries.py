"""What somebody else's package adds: a router, experts and a backend, made known by name, in all that they touch."""

import pytest
import torch
from tiny import tiny_config, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers import initialization as init
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from mhmoe import MHMoEConfig, MHMoEForCausalLM
from mhmoe.configuration import ExpertsType, RouterType, costs
from mhmoe.configuration.configuration_mhmoe import EXPERTS_TYPES, ROUTER_TYPES
from mhmoe.modeling_mhmoe import register_experts, register_router
from mhmoe.modeling_mhmoe.experts import EXPERTS, MHMoEExperts, WeightsView
from mhmoe.modeling_mhmoe.routers import ROUTERS, MHMoETopKRouter


class LowRankRouterType(RouterType):
    fields = ("router_low_rank",)

    def check(self, config: MHMoEConfig) -> None:
        if config.router_low_rank < 1:
            raise ValueError(f"router_low_rank={config.router_low_rank} must be at least 1.")

    def width(self, config: MHMoEConfig) -> int:
        return config.router_low_rank

    def parameters(self, config: MHMoEConfig) -> int:
        return config.router_low_rank * (config.num_experts + config.hidden_size // config.num_moe_heads)

    multiply_adds = parameters


class LowRankRouter(MHMoETopKRouter):
    def __init__(self, config: MHMoEConfig):
        super().__init__(config)
        self.down = nn.Parameter(torch.empty(config.router_low_rank, self.weight.shape[1]))
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.router_low_rank))

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        init.normal_(self.down, mean=0.0, std=std)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states @ self.down.T @ self.weight.T


class FactoredExpertsType(ExpertsType):
    """Whose gate and up matrices are products of two thin ones."""

    fields = ("expert_rank",)
    parts = ()

    def check(self, config: MHMoEConfig) -> None:
        if config.use_bitnet:
            raise ValueError("use_bitnet=True has no way to round experts_type='factored'; leave one out.")

    def parameters(self, config: MHMoEConfig) -> int:
        width, inner = config.hidden_size // config.num_moe_heads, config.moe_intermediate_size
        return config.expert_rank * (width + 2 * inner) + width * inner


class FactoredExperts(MHMoEExperts):
    def __init__(self, config: MHMoEConfig):
        super().__init__(config)
        experts, rows, width = self.gate_up_proj.shape
        del self.gate_up_proj
        self.thin = nn.Parameter(torch.empty(experts, config.expert_rank, width))
        self.tall = nn.Parameter(torch.empty(experts, rows, config.expert_rank))

    def init_weights(self, std: float) -> None:
        for parameter in self.parameters():
            init.normal_(parameter, std=std)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        view = WeightsView(self, {"gate_up_proj": self.tall @ self.thin, "down_proj": self.down_proj})
        return MHMoEExperts.forward(view, hidden_states, top_k_index, top_k_weights)


@pytest.fixture
def factored():
    register_experts("factored", FactoredExperts, FactoredExpertsType())
    yield {"experts_type": "factored", "expert_rank": 3}
    del EXPERTS_TYPES["factored"], EXPERTS["factored"]


def test_experts_run_count_and_load_on_every_backend(tmp_path, factored):
    model = tiny_model(**factored, initializer_range=0.3)
    assert costs(model.config).parameters == model.num_parameters()
    # layers, experts, rank, d/h and gate and up rows, d/h times inner size
    assert costs(model.config).expert_parameters == 2 * 6 * (3 * (24 + 2 * 16) + 24 * 16)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    input_ids = torch.arange(3, 19)[None]
    results = {}
    for backend in ("eager", "grouped_mm", "batched_mm", "subtoken"):
        for each in (model, loaded):
            each.set_experts_implementation(backend)
            each.zero_grad()
            outputs = each(input_ids, labels=input_ids)
            outputs.loss.backward()
            gradients = {name: parameter.grad for name, parameter in each.named_parameters()}
            results[backend, each is loaded] = {"logits": outputs.logits, **gradients}
    expected = results["eager", False]
    assert all(tensor.any() for tensor in expected.values())
    for result in results.values():
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_experts_own_check_plans_and_the_refusal_of_their_fields_elsewhere(factored):
    config = tiny_config(**factored)
    assert not any(".experts" in rule for rule in {**config.base_model_tp_plan, **config.base_model_ep_plan})
    with pytest.raises(ValueError, match="use_bitnet=True has no way to round experts_type='factored'"):
        tiny_config(**factored, use_bitnet=True)
    with pytest.raises(ValueError, match="expert_rank=3 is for experts_type='factored'; set that too"):
        tiny_config(expert_rank=3)
    with pytest.raises(ValueError, match="experts_type='gated' is known already"):
        register_experts("gated", FactoredExperts)


@pytest.fixture
def low_rank():
    register_router("low_rank", LowRankRouter, LowRankRouterType())
    yield {"router_type": "low_rank", "router_low_rank": 3}
    del ROUTER_TYPES["low_rank"], ROUTERS["low_rank", False], ROUTERS["low_rank", True]


@pytest.mark.parametrize("balanced", [{}, {"router_bias_update_rate": 0.1}], ids=["plain", "biased"])
def test_router_runs_counts_and_loads(tmp_path, low_rank, balanced):
    model = tiny_model(**low_rank, **balanced)
    counted = costs(model.config)
    assert counted.parameters == model.num_parameters()
    assert counted.router_multiply_adds == 2 * 2 * 3 * (6 + 24)  # layers, sub-tokens, rank, experts and d/h

    input_ids = torch.arange(3, 19)[None]
    outputs = model(input_ids, labels=input_ids, output_router_logits=True)
    outputs.loss.backward()
    assert model.model.layers[0].mlp.gate.down.grad.any()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


def test_router_s_own_check_and_the_refusal_of_its_fields_elsewhere(low_rank):
    with pytest.raises(ValueError, match="router_low_rank=0 must be at least 1"):
        tiny_config(router_type="low_rank", router_low_rank=0)
    with pytest.raises(ValueError, match="router_low_rank=3 is for router_type='low_rank'; set that too"):
        tiny_config(router_low_rank=3)
    with pytest.raises(ValueError, match="router_dim=3 is for router_type='xmoe'"):
        tiny_config(**low_rank, router_dim=3)
    with pytest.raises(ValueError, match="router_type='low_rank' is known already"):
        register_router("low_rank", LowRankRouter)


def test_name_that_nobody_registered():
    with pytest.raises(ValueError, match="router_type='low_rank' is not known; choose one of softmax, xmoe, or"):
        MHMoEConfig(router_type="low_rank")
    with pytest.raises(ValueError, match="experts_type='factored' is not known; choose one of gated, two_matrix, or"):
        MHMoEConfig(experts_type="factored")


def test_experts_backend():
    calls = []

    def counting(self, *inputs):
        calls.append(type(self).__name__)
        return ALL_EXPERTS_FUNCTIONS["batched_mm"](self, *inputs)

    model, input_ids = tiny_model(), torch.arange(3, 19)[None]
    expected = model(input_ids).logits
    ALL_EXPERTS_FUNCTIONS.register("counting", counting)
    try:
        model.set_experts_implementation("counting")
        torch.testing.assert_close(model(input_ids).logits, expected)
        MHMoEForCausalLM(tiny_config(experts_implementation="counting"))(input_ids)
    finally:
        del ALL_EXPERTS_FUNCTIONS._global_mapping["counting"]
    assert calls == ["MHMoEExperts"] * 4
