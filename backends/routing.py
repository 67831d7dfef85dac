"""Rows in the order of their experts."""

from collections import Counter
from dataclasses import dataclass
from itertools import accumulate

import torch


FEW = 64  # rows, of tokens times experts, that are sorted sooner than a tensor's sorting starts


@dataclass
class Routing:
    """
    Where the rows of S tokens, of which each goes to k experts, lie when they are sorted by expert. An expert's rows
    may be followed by spare ones, which fill them up to a size for which the library has its product ready.

    Attributes:
        experts: those that have rows.
        loads: rows of each of these.
        firsts: where their rows start.
        padded: rows of each of these, spare ones included.
        starts: where their rows start in a buffer with spare rows.
        size: rows of that buffer. One more, of zeros, stands for what was sent to experts that are not here.
        tokens: the token of each row, `(sum of loads,)`.
        slots: which of the S * k weights belongs to each row, `(sum of loads,)`.
        places: the row of the buffer that holds each token's outputs, `(S, k)`.
        missing: whether anything was sent to experts that are not here.
    """

    experts: list[int]
    loads: list[int]
    firsts: list[int]
    padded: list[int]
    starts: list[int]
    size: int
    tokens: torch.Tensor
    slots: torch.Tensor
    places: torch.Tensor
    missing: bool


def route(top_k_index: torch.Tensor, num_experts: int, dtype: torch.dtype) -> Routing:
    """Sort the rows of `top_k_index` `(S, k)`; ids from `num_experts` on are of experts that another process has."""
    top_k = max(top_k_index.shape[-1], 1)
    if top_k_index.numel() <= FEW:
        return _route_few(top_k_index.flatten().tolist(), num_experts, top_k)
    ids = top_k_index.flatten().clamp(max=num_experts)
    slots = ids.argsort(stable=True)
    all_loads = torch.bincount(ids, minlength=num_experts + 1).tolist()
    experts = [expert for expert, load in enumerate(all_loads[:-1]) if load]
    loads = [all_loads[expert] for expert in experts]
    padded = [padded_load(load, dtype) for load in loads]
    *starts, size = accumulate(padded, initial=0)
    *firsts, rows = accumulate(loads, initial=0)
    positions = torch.arange(rows)
    if size != rows:
        shifts = [start - first for start, first in zip(starts, firsts, strict=True)]
        positions += torch.repeat_interleave(torch.tensor(shifts), torch.tensor(loads))
    places = torch.full_like(slots, size)
    slots = slots[:rows]
    places[slots] = positions
    missing = rows != ids.numel()
    return Routing(
        experts, loads, firsts, padded, starts, size, slots // top_k, slots, places.view(-1, top_k), missing
    )


def _route_few(ids: list[int], num_experts: int, top_k: int) -> Routing:
    """The same without tensors, and without spare rows."""
    slots = sorted((slot for slot, expert in enumerate(ids) if expert < num_experts), key=ids.__getitem__)
    counts = Counter(ids[slot] for slot in slots)
    experts, loads = list(counts), list(counts.values())
    *firsts, rows = accumulate(loads, initial=0)
    places = [rows] * len(ids)
    for row, slot in enumerate(slots):
        places[slot] = row
    tokens, slots, places = (
        torch.tensor(numbers, dtype=torch.int64) for numbers in ([slot // top_k for slot in slots], slots, places)
    )
    missing = rows != len(ids)
    return Routing(experts, loads, firsts, loads, firsts, rows, tokens, slots, places.view(-1, top_k), missing)


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
