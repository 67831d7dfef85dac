"""The MH-MoE layer. This file travels to the Hub: it imports only torch, transformers and its siblings.

Shapes: B sequences, T tokens, d hidden size, h MoE heads, S = B * T * h sub-tokens of d/h numbers; the head index runs
fastest. P1 is arXiv 2404.15045, P2 is arXiv 2411.16205.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import initialization as init
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import logging

from .configuration_mhmoe import MHMoEConfig
from .experts import SubTokenExperts
from .load_balancing import by_head, load_balancing_loss, z_loss
from .routers import MHMoETopKRouter
from .variants import make_experts, make_head_layer, make_merge_layer, make_mlp, make_router
from .zero_merge import warn_if_cut_off


logger = logging.get_logger(__name__)


class MHMoESparseMoeBlock(nn.Module):
    """Head layer, split, router, experts, merge layer (P1 eq. 2 to 7), and the shared expert of P2 beside them."""

    def __init__(self, config: MHMoEConfig):
        super().__init__()
        self.sub_token_dim = config.sub_token_size
        self.router_input = config.router_input
        self.head_layer = make_head_layer(config)
        self.merge_layer = make_merge_layer(config)
        self.gate = make_router(config)
        self.experts = make_experts(config)
        self.shared_expert = (
            make_mlp(config, config.shared_expert_intermediate_size)
            if config.shared_expert_intermediate_size
            else None
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        latent = self.head_layer(hidden_states)  # (B, T, d), or (B, T, l)
        sub_tokens = latent.view(-1, self.sub_token_dim)  # (S, d/h)
        seen = {"sub_token": sub_tokens, "token": hidden_states, "latent": latent}[self.router_input]
        output = self.merge_layer(self.route(sub_tokens, seen).view(latent.shape))  # (B, T, d)
        if self.shared_expert is not None:
            output = output + self.shared_expert(hidden_states)
        return output

    def route(self, sub_tokens: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        _, top_k_weights, top_k_index = self.gate(seen)
        return self.experts(sub_tokens, top_k_index, top_k_weights)  # (S, d/h)


class MHMoEResidualBlock(MHMoESparseMoeBlock):
    """With the sub-token residual, all of P1 eq. 6."""

    def route(self, sub_tokens: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        return sub_tokens + super().route(sub_tokens, seen)


def start_weights(module: nn.Module, std: float) -> None:
    """The random start of a module of the layer that transformers' own `_init_weights` does not know."""
    if isinstance(module, SubTokenExperts | MHMoETopKRouter):
        module.init_weights(std)
    elif isinstance(module, nn.Linear | nn.Conv1d) and hasattr(module, "xavier_gain"):
        init.xavier_uniform_(module.weight, gain=module.xavier_gain)  # ty: ignore[invalid-argument-type]: a float


def experts_implementation(
    requested: str | None, configs: Sequence[MHMoEConfig], dtype: torch.dtype | str | None
) -> str | None:
    """The experts backend that does for layers of these `configs`, `None` where transformers should choose."""
    # mhmoe's own, on CPU, where mhmoe has registered it
    if requested is None and "subtoken" in ALL_EXPERTS_FUNCTIONS and not torch.accelerator.is_available():
        return "subtoken"
    # grouped_mm, the library's default, wants rows of whole 16 bytes; the default must do in every dtype
    rows = {size for config in configs for size in (config.sub_token_size, config.moe_intermediate_size)}
    dtype = dtype or torch.get_default_dtype()
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # a string where a config was set so
    itemsize = 2 if requested is None else dtype.itemsize
    if requested in (None, "grouped_mm") and any(row * itemsize % 16 for row in rows):
        if requested is not None:
            logger.warning(f"grouped_mm cannot do experts of sizes {sorted(rows)} in this dtype; they run eagerly.")
        return "eager"
    return requested


# and all else that encoders import
__all__ = [
    "MHMoEResidualBlock",
    "MHMoESparseMoeBlock",
    "by_head",
    "experts_implementation",
    "load_balancing_loss",
    "start_weights",
    "warn_if_cut_off",
    "z_loss",
]
