"""
The experts of a few rows, as in decoding: every product reads its expert where it lies. Sorting by tensors, chunks and
buffers would take longer than such products themselves.
"""

from collections import Counter

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
    output = torch.zeros(tokens * top_k, hidden_states.shape[-1], dtype=dtype)
    ids = top_k_index.flatten().tolist()
    # by expert, so that each is read once; ids from E on are of experts that another process has
    slots = sorted((slot for slot, expert in enumerate(ids) if expert < len(first_proj)), key=ids.__getitem__)
    if slots:
        loads = Counter(ids[slot] for slot in slots)
        rows = hidden_states.to(dtype)[torch.tensor([slot // top_k for slot in slots])]
        first = _products(rows, first_proj, loads)
        inner = torch.empty(len(slots), down_proj.shape[2], dtype=dtype)
        gate.forward(first, inner)
        output[torch.tensor(slots)] = _products(inner, down_proj, loads)
    return output.mul_(top_k_weights.to(dtype).reshape(-1, 1)).view(tokens, top_k, -1).sum(dim=1)


def _products(rows: Tensor, weights: Tensor, loads: Counter[int]) -> Tensor:
    """Sorted rows (n, a) times their experts' matrices, of `weights` (E, b, a): (n, b)."""
    pairs = zip(rows.split(list(loads.values())), loads, strict=True)
    return torch.cat([linear(own, weights[expert].to(rows.dtype)) for own, expert in pairs])
