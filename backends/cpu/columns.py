"""
The output of experts whose rows are multiplied as columns: weight (b, a) times columns (a, n), for some neighbouring
experts at once.

In bfloat16, oneDNN brings the right factor of a product into another order first. With AMX that takes longer than the
product of some rows itself. As the right factor here are the rows, not the weight, which is many times as large.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..problem import Problem
from . import memory, workers
from .choices import way
from .routing import combine, route
from .tuning import CHUNK_ROWS, LOADS, NEIGHBOURS, READ_ROWS


@dataclass
class Group:
    """Neighbouring experts of as many rows each, or a piece of an expert's rows."""

    first: int
    count: int
    load: int


def suit(problem: Problem) -> bool:
    """Whether columns are the faster way to the output."""
    usual = all(weight.stride(-1) == 1 for weight in (problem.first_proj, problem.down_proj))
    load = max(problem.top_k_index.numel() / problem.num_experts, LOADS[1])  # single rows are for few_rows.py
    return usual and way(problem.dtype, load) == "columns"


def forward(problem: Problem) -> Tensor:
    """The output (S, d) without gradients, in the dtype of the products."""
    dtype, first_proj, down_proj = problem.dtype, problem.first_proj, problem.down_proj
    groups: list[Group] = []

    def fill(experts: list[int], loads: list[int]) -> list[int]:
        filled = []
        for start, count in _neighbours(experts, loads):
            load = _filled_up(max(loads[start : start + count]))
            filled += [load] * count
            pieces = _pieces(load) if count == 1 else [load]
            groups.extend(Group(experts[start], count, piece) for piece in pieces)
        return filled

    routing = route(problem.top_k_index, problem.num_experts, fill)
    hidden_states = problem.hidden_states.to(dtype)
    outputs = memory.empty((routing.size + routing.missing, hidden_states.shape[-1]), dtype)
    outputs[routing.size :] = 0
    weights = problem.top_k_weights.to(dtype).reshape(-1)[routing.slots, None]  # (rows, 1)
    starts = list(accumulate((group.count * group.load for group in groups), initial=0))
    longest = max((group.count * group.load for group in groups), default=0)

    def make_task():
        sizes = hidden_states.shape[1], first_proj.shape[1], down_proj.shape[2], down_proj.shape[1]
        buffers = [hidden_states.new_empty(longest * size) for size in sizes]

        def task(index: int) -> None:
            group, span = groups[index], slice(starts[index], starts[index + 1])
            count, load, experts = group.count, group.load, slice(group.first, group.first + group.count)
            rows, *columns = (buffer[: count * load * size] for buffer, size in zip(buffers, sizes, strict=True))
            first, inner, product = (buffer.view(count, -1, load) for buffer in columns)
            torch.index_select(hidden_states, 0, routing.tokens[span], out=rows.view(count * load, -1))
            torch.bmm(first_proj[experts].to(dtype), rows.view(count, load, -1).transpose(1, 2), out=first)
            problem.activation.forward(first.transpose(1, 2), inner.transpose(1, 2))
            torch.bmm(down_proj[experts].to(dtype), inner, out=product)
            for output, columns in zip(outputs[span].split(load), product.unbind(0), strict=True):
                output.copy_(columns.t())  # of two dimensions torch transposes block by block
            outputs[span].mul_(weights[span])  # rounded row by row, as where rows come from other processes

        return task

    costs = [group.count * (group.load + READ_ROWS) * first_proj[0].numel() for group in groups]
    workers.run(make_task, costs)
    return combine(outputs, routing.places)


def _neighbours(experts: list[int], loads: list[int]) -> list[tuple[int, int]]:
    """Positions and counts of neighbours of about as many rows, which are filled up to the same number."""
    found, start = [], 0
    while start < len(experts):
        for count in NEIGHBOURS:
            some = [_filled_up(load) for load in loads[start : start + count]]
            size = max(some) * count
            adjacent = len(some) == count and experts[start + count - 1] - experts[start] == count - 1
            if count == 1 or (adjacent and size <= min(CHUNK_ROWS, 1.5 * sum(some))):
                found.append((start, count))
                start += count
                break
    return found


def _filled_up(load: int) -> int:
    """There are few shapes, since the library makes a program for each, which takes longer than a small product."""
    step = 8 if load <= 32 else 16
    return -(-load // step) * step


def _pieces(load: int) -> list[int]:
    """About CHUNK_ROWS each."""
    count = -(-load // CHUNK_ROWS)
    step = _filled_up(-(-load // count))
    return [min(step, load - done) for done in range(0, load, step)]
