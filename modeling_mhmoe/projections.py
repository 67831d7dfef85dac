"""Head and merge layers, around the split of tokens into sub-tokens.

This file travels to the Hub: it imports only torch, transformers and its siblings.
Shapes: B sequences, T tokens, d hidden size, h MoE heads. P1 is arXiv 2404.15045.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from .configuration_mhmoe import MHMoEConfig


class Conv1dSplit(nn.Module):
    """
    The token split of P1's appendix, in place of a head layer: a convolution along the d numbers of a token with a
    channel, of d/h numbers, for every head. A kernel longer than the stride sees zeros beyond both ends.
    """

    def __init__(self, config: MHMoEConfig):
        super().__init__()
        kernel_size, stride = config.conv_sizes
        self.padding = config.conv_padding
        self.conv = nn.Conv1d(1, config.num_moe_heads, kernel_size, stride, bias=config.head_merge_bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        signal = nn.functional.pad(hidden_states.reshape(-1, 1, hidden_states.shape[-1]), self.padding)
        return self.conv(signal).view(hidden_states.shape)  # (B * T, h, d/h) -> (B, T, d), sub-token by sub-token


def linear_layers(config: MHMoEConfig, sizes: Sequence[int]) -> nn.Module:
    """
    Linear layers from each of `sizes` to the next, with ReLU between (P1 table 7); one is a plain `nn.Linear`, and
    none changes nothing.
    """
    layers = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.ReLU(), nn.Linear(inputs, outputs, bias=config.head_merge_bias)]
    match layers[1:]:
        case []:
            return nn.Identity()
        case [single]:
            return single
        case several:
            return nn.Sequential(*several)


def mark_start(layer: nn.Module, config: MHMoEConfig, gain: float) -> nn.Module:
    """Marks what starts Xavier-uniform with `gain`, as in P1; `_init_weights` sees modules without their names."""
    if config.head_merge_init == "xavier":
        for module in layer.modules():
            # ty: ignore[invalid-assignment]: torch's stub knows submodules and tensors alone
            module.xavier_gain = gain
    return layer
