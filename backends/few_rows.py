"""
The experts of a few rows, as in decoding: every row is a product of its own, which reads its expert where it lies.
Nothing is sorted, gathered or put into buffers, which would take longer than such products themselves.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from .gates import ModuleGate, SiluGate
from .products import linear


FEW = 16  # rows, of tokens times experts


def forward(
    hidden_states: Tensor,
    first_proj: Tensor,
    down_proj: Tensor,
    top_k_weights: Tensor,
    top_k_index: Tensor,
    gate: SiluGate | ModuleGate,
    dtype: torch.dtype,
) -> Tensor:
    """(S, d), (E, 2i or i, d), (E, d, i), (S, k), (S, k) -> (S, d), without gradients, all products in `dtype`."""
    tokens, top_k = top_k_index.shape
    num_experts = len(first_proj)
    output = torch.zeros(tokens * top_k, hidden_states.shape[-1], dtype=dtype)
    slots, experts = [], []
    for slot, expert in enumerate(top_k_index.flatten().tolist()):
        if expert < num_experts:  # the others are another process's
            slots.append(slot)
            experts.append(expert)
    if experts:
        rows = hidden_states.to(dtype).split(1)
        first = _products((rows[slot // top_k] for slot in slots), first_proj, experts)
        inner = torch.empty(len(slots), down_proj.shape[2], dtype=dtype)
        gate.forward(first, inner)
        products = _products(inner.split(1), down_proj, experts)
        output = products if len(slots) == len(output) else output.index_copy_(0, torch.tensor(slots), products)
    return output.mul_(top_k_weights.to(dtype).reshape(-1, 1)).view(tokens, top_k, -1).sum(dim=1)


def _products(rows: Iterable[Tensor], weights: Tensor, experts: list[int]) -> Tensor:
    """Each of the `rows` (1, a) times its expert's matrix, of `weights` (E, b, a): (n, b)."""
    pairs = zip(rows, experts, strict=True)
    return torch.cat([linear(row, weights[expert].to(row.dtype)) for row, expert in pairs])
