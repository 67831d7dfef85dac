"""Rows in the order of their experts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..problem import Problem
from . import memory
from .tuning import STEP_ROWS


@dataclass
class Routing:
    """
    Where the rows of S tokens, of which each goes to k experts, lie when they are sorted by expert. An expert's rows
    may be followed by spare ones, of zeros, which fill them up to a size for which the library has its product ready,
    or to that of its neighbours.

    Attributes:
        experts: those that have rows.
        loads: rows of each of these, spare ones included.
        size: all rows. One more, of zeros, stands for what was sent to experts that are not here.
        tokens: the token of each row, `(size,)`; S for spare ones.
        slots: which of the S * k weights belongs to each row, `(size,)`; any for spare ones.
        spare: whether there are spare rows.
        places: the row of each token's outputs, `(S, k)`.
        missing: whether anything was sent to experts that are not here.
    """

    experts: list[int]
    loads: list[int]
    size: int
    tokens: Tensor
    slots: Tensor
    spare: bool
    places: Tensor
    missing: bool

    def with_zeros(self, tokens: Tensor) -> Tensor:
        """`tokens` (S, d), and the one that spare rows are of."""
        return torch.cat([tokens, tokens.new_zeros(1, tokens.shape[1])]) if self.spare else tokens


def route(top_k_index: Tensor, num_experts: int, fill: Callable[[list[int]], list[int]]) -> Routing:
    """
    Sort the rows of `top_k_index` `(S, k)`; ids from `num_experts` on are of experts that another process has. `fill`
    is told the rows of each expert, and says how many each is filled up to.
    """
    order, loads, elsewhere = by_expert(top_k_index, num_experts)
    filled = fill(loads)
    rows, size = sum(loads), sum(filled)
    slots, positions = order[:rows], np.arange(rows, dtype=np.int64)
    tokens = slots // max(top_k_index.shape[1], 1)
    if spare := size != rows:
        shift = np.cumsum([0, *filled[:-1]]) - np.cumsum([0, *loads[:-1]])
        positions += np.repeat(shift, loads)
        all_slots, all_tokens = np.zeros(size, np.int64), np.full(size, len(top_k_index), np.int64)
        all_slots[positions], all_tokens[positions] = slots, tokens
        slots, tokens = all_slots, all_tokens
    places = np.full(len(order), size, np.int64)
    places[order[:rows]] = positions
    used = [expert for expert, load in enumerate(filled) if load]
    tokens, slots, places = map(torch.from_numpy, (tokens, slots, places))
    used_loads = [filled[expert] for expert in used]
    return Routing(used, used_loads, size, tokens, slots, spare, places.view(top_k_index.shape), elsewhere > 0)


def by_expert(top_k_index: Tensor, num_experts: int) -> tuple[np.ndarray, list[int], int]:
    """
    The order that sorts the rows of `top_k_index` `(S, k)` by expert, how many each expert has, and how many are of
    experts that another process has. NumPy sorts small integers ten times as fast as torch does.
    """
    ids = np.minimum(top_k_index.flatten().numpy(), num_experts)
    order = ids.astype(np.min_scalar_type(num_experts)).argsort(kind="stable")
    *loads, elsewhere = np.bincount(ids, minlength=num_experts + 1).tolist()
    return order, loads, elsewhere


def by_steps(dtype: torch.dtype) -> Callable[[list[int]], list[int]]:
    """Each expert's rows filled up for itself."""
    return lambda loads: [filled_up(load, dtype) for load in loads]


def filled_up(load: int, dtype: torch.dtype) -> int:
    """
    Rows that `load` rows are filled up to. In 16 bits the library makes a program for every new shape of a product,
    which takes longer than a small product itself; so there are few shapes.
    """
    return load if dtype.itemsize > 2 or load <= 16 else -(-load // STEP_ROWS) * STEP_ROWS


def spare_rows(num_experts: int, dtype: torch.dtype) -> int:
    """How many rows all experts together are filled up with at most."""
    return 0 if dtype.itemsize > 2 else (STEP_ROWS - 1) * num_experts


def row_weights(problem: Problem, routing: Routing) -> Tensor:
    """The weight of each row, `(size, 1)`, in the dtype of the products."""
    return problem.top_k_weights.to(problem.dtype).reshape(-1).index_select(0, routing.slots)[:, None]


def combine(rows: Tensor, places: Tensor) -> Tensor:
    """Sums of the `rows` at `places` (S, k): (S, d)."""
    return F.embedding_bag(places, rows, mode="sum") if len(places) else rows.new_empty(0, rows.shape[-1])


def empty_gradient(parameter: Tensor, used: Sequence[int]) -> Tensor:
    """Of a parameter's shape, and zero for the experts that are not `used`; the others are left to be written."""
    strides = torch.empty_like(parameter, device="meta").stride()
    gradient = memory.empty(parameter.shape, parameter.dtype).as_strided(parameter.shape, strides)
    for before, after in pairwise([-1, *used, len(parameter)]):
        if after - before > 1:
            gradient[before + 1 : after].zero_()
    return gradient
