"""Rows in the order of their experts."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from .tuning import STEP_ROWS


@dataclass
class Routing:
    """
    Where the rows of S tokens, of which each goes to k experts, lie when they are sorted by expert. An expert's rows
    may be followed by spare ones, copies of its last, which fill them up to a size for which the library has its
    product ready.

    Attributes:
        experts: those that have rows.
        loads: rows of each of these, spare ones included.
        size: all rows. One more, of zeros, stands for what was sent to experts that are not here.
        tokens: the token of each row, `(size,)`.
        slots: which of the S * k weights belongs to each row, `(size,)`.
        spare: whether a row is a copy, `(size,)`; None if none is.
        places: the row of each token's outputs, `(S, k)`.
        missing: whether anything was sent to experts that are not here.
    """

    experts: list[int]
    loads: list[int]
    size: int
    tokens: Tensor
    slots: Tensor
    spare: Tensor | None
    places: Tensor
    missing: bool


def route(top_k_index: Tensor, num_experts: int, fill: Callable[[list[int], list[int]], list[int]]) -> Routing:
    """
    Sort the rows of `top_k_index` `(S, k)`; ids from `num_experts` on are of experts that another process has. `fill`
    is told the experts in use and the rows of each, and says how many rows each is filled up to.
    """
    top_k = max(top_k_index.shape[-1], 1)
    ids = top_k_index.flatten().clamp(max=num_experts)
    order = ids.argsort(stable=True)
    all_loads = torch.bincount(ids, minlength=num_experts + 1).tolist()
    experts = [expert for expert, load in enumerate(all_loads[:-1]) if load]
    loads = [all_loads[expert] for expert in experts]
    rows = sum(loads)
    missing = rows != ids.numel()
    filled = fill(experts, loads)
    size, slots, spare = sum(filled), order[:rows], None
    positions = torch.arange(size)
    if size != rows:
        *starts, _ = accumulate(filled, initial=0)
        *firsts, _ = accumulate(loads, initial=0)
        columns = torch.tensor([starts, firsts, loads]).repeat_interleave(torch.tensor(filled), dim=1)
        local = positions - columns[0]
        spare = local >= columns[2]
        slots = slots[columns[1] + torch.minimum(local, columns[2] - 1)]
        positions = positions[~spare]
    places = torch.full_like(order, size)
    places[order[:rows]] = positions
    return Routing(experts, filled, size, slots // top_k, slots, spare, places.view(-1, top_k), missing)


def by_steps(dtype: torch.dtype) -> Callable[[list[int], list[int]], list[int]]:
    """Each expert's rows filled up for itself."""
    return lambda experts, loads: [filled_up(load, dtype) for load in loads]


def filled_up(load: int, dtype: torch.dtype) -> int:
    """
    Rows that `load` rows are filled up to. In 16 bits the library makes a program for every new shape of a product,
    which takes longer than a small product itself; so there are few shapes.
    """
    return load if dtype.itemsize > 2 or load <= 16 else -(-load // STEP_ROWS) * STEP_ROWS


def spare_rows(num_experts: int, dtype: torch.dtype) -> int:
    """How many rows all experts together are filled up with at most."""
    return 0 if dtype.itemsize > 2 else (STEP_ROWS - 1) * num_experts


def combine(rows: Tensor, places: Tensor) -> Tensor:
    """Sums of the `rows` at `places` (S, k): (S, d)."""
    return F.embedding_bag(places, rows, mode="sum") if len(places) else rows.new_empty(0, rows.shape[-1])
