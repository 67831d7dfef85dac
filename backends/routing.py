"""Rows in the order of their experts."""

from dataclasses import dataclass
from itertools import accumulate

import torch


@dataclass
class Routing:
    """
    Where the rows of S tokens, of which each goes to k experts, lie when they are sorted by expert. An expert's rows
    may be followed by spare ones, which fill them up to a size for which the library has its product ready.

    Attributes:
        experts: those that have rows.
        loads: rows of each of these.
        starts: where their rows start in a buffer with spare rows.
        size: rows of that buffer. One more, of zeros, stands for what was sent to experts that are not here.
        tokens: the token of each row, `(sum of loads,)`.
        slots: which of the S * k weights belongs to each row, `(sum of loads,)`.
        places: the row of the buffer that holds each token's outputs, `(S, k)`.
        missing: whether anything was sent to experts that are not here.
    """

    experts: list[int]
    loads: list[int]
    starts: list[int]
    size: int
    tokens: torch.Tensor
    slots: torch.Tensor
    places: torch.Tensor
    missing: bool


def route(top_k_index: torch.Tensor, num_experts: int, dtype: torch.dtype) -> Routing:
    """Sort the rows of `top_k_index` `(S, k)`; ids from `num_experts` on are of experts that another process has."""
    ids = top_k_index.reshape(-1)
    ids = ids.clamp(max=num_experts) if ids.numel() else ids
    slots = ids.argsort(stable=True)
    all_loads = torch.bincount(ids, minlength=num_experts + 1)[: num_experts + 1].tolist()
    experts = [expert for expert, load in enumerate(all_loads[:-1]) if load]
    loads = [all_loads[expert] for expert in experts]
    padded = [padded_load(load, dtype) for load in loads]
    *starts, size = accumulate(padded, initial=0)
    rows = sum(loads)
    places = torch.empty_like(slots)
    positions = torch.arange(rows)
    if size != rows:
        positions += torch.repeat_interleave(
            torch.tensor([start - row for start, row in zip(starts, accumulate(loads, initial=0), strict=False)]),
            torch.tensor(loads),
        )
    if rows != len(slots):
        places.fill_(size)
        slots = slots[:rows]
    places[slots] = positions
    tokens = slots // max(top_k_index.shape[-1], 1)
    return Routing(experts, loads, starts, size, tokens, slots, places.view(top_k_index.shape), rows != ids.numel())


def padded_load(load: int, dtype: torch.dtype) -> int:
    """
    Rows that `load` rows are filled up to. In 16 bits the library makes a program for every new shape of a product,
    which takes longer than a small product itself; so there are few shapes.
    """
    if dtype.itemsize > 2:
        return load
    if load <= 16:
        return 1 << (load - 1).bit_length()
    return -(-load // 16) * 16


def spare_rows(num_experts: int, dtype: torch.dtype) -> int:
    """How many rows all experts together are filled up with at most."""
    return 0 if dtype.itemsize > 2 else 15 * num_experts
