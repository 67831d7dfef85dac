"""Experts in every layout of Transformers, their inputs, and outputs with gradients."""

import torch
from tiny import tiny_config
from torch import nn
from transformers.integrations import use_experts_implementation

from mhmoe.modeling_mhmoe.experts import MHMoEExperts


EXPERTS, WIDTH, INNER, TOP_K = 5, 12, 8, 2
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.004}  # of the largest


@use_experts_implementation(has_gate=False)
class TwoMatrixExperts(nn.Module):
    """Experts without gates, in transformers' layout."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = EXPERTS
        self.up_proj = nn.Parameter(torch.empty(EXPERTS, INNER, WIDTH))
        self.down_proj = nn.Parameter(torch.empty(EXPERTS, WIDTH, INNER))
        self.act_fn = nn.GELU()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return loop(self, hidden_states, top_k_index, top_k_weights, lambda expert: self.up_proj[expert])


@use_experts_implementation(is_transposed=True)
class TransposedExperts(nn.Module):
    """Experts whose matrices are stored the other way round."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = EXPERTS
        self.gate_up_proj = nn.Parameter(torch.empty(EXPERTS, WIDTH, 2 * INNER))
        self.down_proj = nn.Parameter(torch.empty(EXPERTS, INNER, WIDTH))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return loop(self, hidden_states, top_k_index, top_k_weights, lambda expert: self.gate_up_proj[expert].t())


@use_experts_implementation(is_concatenated=False)
class InterleavedExperts(MHMoEExperts):
    """Gates and ups in turn, with a function of their own."""

    def _apply_gate(self, gate_up):
        return gate_up[..., ::2].sigmoid() * (gate_up[..., 1::2] + 1)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return loop(self, hidden_states, top_k_index, top_k_weights, lambda expert: self.gate_up_proj[expert])


def loop(experts, hidden_states, top_k_index, top_k_weights, first_of):
    """One row after the other."""
    rows = []
    for row, (ids, weights) in enumerate(zip(top_k_index.tolist(), top_k_weights, strict=True)):
        output = torch.zeros_like(hidden_states[row])
        for expert, weight in zip(ids, weights, strict=True):
            first = first_of(expert) @ hidden_states[row]
            inner = experts._apply_gate(first) if experts.has_gate else experts.act_fn(first)
            down = experts.down_proj[expert]
            output = output + weight * ((down.t() if experts.is_transposed else down) @ inner)
        rows.append(output)
    return torch.stack(rows)


def make(experts_class=MHMoEExperts, dtype=torch.float32, implementation="subtoken", **fields) -> nn.Module:
    sizes = {"hidden_size": 2 * WIDTH, "moe_intermediate_size": INNER, "num_experts": EXPERTS}
    config = tiny_config(**{**sizes, **fields}, num_experts_per_tok=TOP_K)
    config._experts_implementation = implementation
    experts = experts_class(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
    return experts.to(dtype)


def inputs(rows: int, dtype=torch.float32, experts: int = EXPERTS, top_k: int = TOP_K, width: int = WIDTH):
    """Rows, ids of which expert 1 has none and expert 3 about half, and weights."""
    generator = torch.Generator().manual_seed(rows)
    hidden_states = torch.randn(rows, width, generator=generator)
    scores = torch.rand(rows, experts, generator=generator) + torch.tensor([0, -2, 0, 0.5, 0, 0][:experts])
    weights, index = scores.softmax(-1).topk(top_k)
    return hidden_states.to(dtype), index, weights.to(dtype)


def run(experts, hidden_states, index, weights, forward=None) -> dict[str, torch.Tensor]:
    """Output, and gradients of a sum of it."""
    hidden_states, weights = hidden_states.clone().requires_grad_(), weights.clone().requires_grad_()
    experts.zero_grad()
    output = (experts if forward is None else forward)(hidden_states, index, weights)
    generator = torch.Generator().manual_seed(9)
    output.backward(torch.randn(output.shape, generator=generator).to(output.dtype))
    results = {"output": output.detach(), "input": hidden_states.grad, "weights": weights.grad}
    return results | {name: parameter.grad for name, parameter in experts.named_parameters()}


def assert_near(actual: dict, expected: dict, tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        difference = (actual[name].double() - value.double()).abs().max() / value.double().abs().max()
        assert difference <= tolerance, f"{name}: {difference:.1e}"
