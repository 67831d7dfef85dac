"""What every backend is asked to compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor


if TYPE_CHECKING:
    from .activations import ModuleActivation


@dataclass
class Problem:
    """
    The experts of one MoE layer and the tokens they get: S tokens of d numbers, of which each goes to k of E experts
    of inner size i. The result is (S, d), in the dtype of `hidden_states`.

    Attributes:
        hidden_states: (S, d).
        first_proj: (E, 2i, d) where the experts are gated, else (E, i, d).
        down_proj: (E, d, i).
        top_k_weights: (S, k).
        top_k_index: (S, k); from E on, experts that another process has, which add nothing.
        activation: what stands between the two products.
        dtype: of the products.
        partial: whether there may be ids from E on.
    """

    hidden_states: Tensor
    first_proj: Tensor
    down_proj: Tensor
    top_k_weights: Tensor
    top_k_index: Tensor
    activation: ModuleActivation
    dtype: torch.dtype
    partial: bool = False

    @property
    def differentiable(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tensors that may have gradients, in the order that all backends keep."""
        return self.hidden_states, self.first_proj, self.down_proj, self.top_k_weights

    @property
    def needs_gradients(self) -> bool:
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self.differentiable)

    @property
    def num_experts(self) -> int:
        return len(self.first_proj)


def product_dtype(weights: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, else that of the weights."""
    device_type = weights.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weights.dtype
