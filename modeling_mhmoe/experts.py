"""The FFNs: of whole tokens (dense, or shared expert) and of sub-tokens (routed experts), each gated or not.

This file travels to the Hub: it imports only torch, transformers and its siblings.
Shapes: S sub-tokens of d/h numbers, E experts, k experts per sub-token, i expert inner size.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.models.llama.modeling_llama import LlamaMLP

from .configuration_mhmoe import EXPERTS_TYPES, ExpertsType, MHMoEConfig


class MHMoEMLP(LlamaMLP):
    """Llama's SwiGLU with an inner size of its own: the dense FFN of some layers, the shared expert of others."""

    def __init__(self, config: MHMoEConfig, intermediate_size: int):
        nn.Module.__init__(self)
        self.config = config
        self.hidden_size = config.hidden_size
        self.intermediate_size = intermediate_size
        self.gate_proj = nn.Linear(self.hidden_size, intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(self.hidden_size, intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(intermediate_size, self.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]


class MHMoETwoMatrixMLP(nn.Module):
    """The FFN of P1, W2 act(W1 x), in the same two places."""

    def __init__(self, config: MHMoEConfig, intermediate_size: int):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class SubTokenExperts(nn.Module):
    """
    What all kinds of experts share: matrices in the 3-D layout of transformers' MoE models, whose backends they take.

    Attributes:
        matrices: names of the parameters, first and last product, and how many matrices share the rows of each.
        has_gate: whether the first product holds gates, as transformers' decorator is told.
    """

    matrices: dict[str, int]
    has_gate: bool
    act_fn: nn.Module
    _apply_gate: Callable[[torch.Tensor], torch.Tensor]  # which transformers' decorator adds

    def __init__(self, config: MHMoEConfig):
        super().__init__()
        self.num_experts = config.num_routed_experts
        self.hidden_dim = config.sub_token_size
        self.intermediate_dim = config.moe_intermediate_size
        (first, stacked), (last, _) = self.matrices.items()
        shape = (self.num_experts, stacked * self.intermediate_dim, self.hidden_dim)
        self.register_parameter(first, nn.Parameter(torch.empty(shape)))
        shape = (self.num_experts, self.hidden_dim, self.intermediate_dim)
        self.register_parameter(last, nn.Parameter(torch.empty(shape)))
        self.act_fn = ACT2FN[config.hidden_act]

    def init_weights(self, std: float) -> None:
        for name in self.matrices:
            init.normal_(getattr(self, name), mean=0.0, std=std)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The "eager" backend, one expert after the other: (S, d/h), (S, k), (S, k) -> (S, d/h)."""
        output = torch.zeros_like(hidden_states)
        # unbind once: indexing the 3-D parameter in the loop would allocate a full-size gradient for every expert
        weights = zip(*(getattr(self, name).unbind(0) for name in self.matrices), strict=True)
        for expert, (first_proj, down_proj) in enumerate(weights):
            rows, slots = torch.where(top_k_index == expert)
            inner = linear(hidden_states[rows], first_proj)
            inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
            expert_output = linear(inner, down_proj) * top_k_weights[rows, slots, None]
            output.index_add_(0, rows, expert_output.to(output.dtype))
        return output


class WeightsView:
    """An experts module as its backends see it, with other weights."""

    def __init__(self, experts: SubTokenExperts, weights: dict[str, torch.Tensor]):
        self.experts = experts
        self._parameters = weights
        vars(self).update(weights)

    def named_parameters(self):
        return self._parameters.items()

    def __getattr__(self, name: str):
        return getattr(self.experts, name)


class MHMoEExperts(SubTokenExperts):
    """The SwiGLU of P2."""

    matrices = {"gate_up_proj": 2, "down_proj": 1}


class MHMoETwoMatrixExperts(SubTokenExperts):
    """The FFN of P1, W2 act(W1 x)."""

    matrices = {"up_proj": 1, "down_proj": 1}


# they change the classes; as decorators they would hide them from type checkers, as some `type[nn.Module]`
use_experts_implementation(MHMoEExperts)
use_experts_implementation(MHMoETwoMatrixExperts, has_gate=False)

EXPERTS: dict[str, type[SubTokenExperts]] = {"gated": MHMoEExperts, "two_matrix": MHMoETwoMatrixExperts}


def register_experts(name: str, experts_class: type[SubTokenExperts], experts_type: ExpertsType | None = None) -> None:
    """
    Makes a kind of routed experts known, which `experts_type=name` in a config then chooses.

    Args:
        name: a new name.
        experts_class: a subclass of [`MHMoEExperts`] or [`MHMoETwoMatrixExperts`], or one of [`SubTokenExperts`] that
            transformers' `use_experts_implementation` has changed. A forward that makes the usual matrices of other
            parameters hands them on in a [`WeightsView`]: so it runs on every backend.
        experts_type: the config's fields that it takes, its checks and its costs; by default those of gated experts.

    Raises:
        ValueError: there are experts of this name.
    """
    if name in EXPERTS_TYPES:
        raise ValueError(f"experts_type={name!r} is known already; choose another name.")
    EXPERTS_TYPES[name] = experts_type or ExpertsType()
    EXPERTS[name] = experts_class


@cache
def keeping(weights: type[SubTokenExperts], plain: type[SubTokenExperts]) -> type[SubTokenExperts]:
    """A class of experts that compute as `plain` does, and keep their weights as the class `weights` does."""
    return type(f"{weights.__name__}Of{plain.__name__}", (weights, plain), {"plain": plain})
