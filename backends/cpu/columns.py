"""
Experts whose rows are multiplied as columns: weight (b, a) times columns (a, n), for neighbouring experts at once.

In bfloat16, oneDNN brings the right factor of a product into another order first. With AMX that takes longer than the
product of some rows itself. As the right factor here are the rows, not the weight, which is many times as large. And a
call takes as long as the product of hundreds of rows: oneDNN looks for its program for each shape, and makes one for a
new shape. So neighbours are filled up to the same number of rows, of which there are few. That is also why the small
experts of 16 bits come here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..problem import Problem
from . import memory, workers
from .choices import load, row_cost, small, way
from .routing import Routing, combine, empty_gradient, route, row_weights
from .tuning import BATCH_NUMBERS, CALL, CHUNK_ROWS, READ_ROWS


@dataclass
class Batch:
    """Neighbouring experts of `load` rows each, spare ones included, or a piece of an expert's rows."""

    first: int
    count: int
    load: int
    start: int

    @property
    def size(self) -> int:
        return self.count * self.load

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.size)

    @property
    def experts(self) -> slice:
        return slice(self.first, self.first + self.count)

    def columns(self, buffer: Tensor, height: int) -> Tensor:
        """A part of `buffer` (numbers,) as (count, height, load)."""
        return buffer[: self.size * height].view(self.count, height, self.load)


@dataclass
class Batches:
    """
    The rows of a problem, and how they are divided.

    Attributes:
        longest: rows of the largest batch.
        costs: of each batch, and of what takes as long as reading its matrices, as `choices.row_cost` counts.
    """

    routing: Routing
    parts: list[Batch]
    longest: int
    costs: list[int]


def suit(problem: Problem, with_gradients: bool) -> bool:
    """Whether this is the fastest way; it was measured without gradients, which of single rows are made faster."""
    if with_gradients and problem.top_k_index.numel() < problem.num_experts:
        return False
    if torch._C._len_torch_dispatch_stack():  # who counts operators should not count spare rows
        return False
    small_16_bit = problem.dtype.itemsize == 2 and small(problem)
    usual = all(weight.stride(-1) == 1 for weight in (problem.first_proj, problem.down_proj))
    return usual and (small_16_bit or way(problem.dtype, load(problem)) == "columns")


def divide(problem: Problem, pieces: bool) -> Batches:
    """`pieces`: whether the rows of an expert that has many may be divided, too."""
    found: list[Batch] = []
    row, width = row_cost(problem), problem.first_proj.shape[1]

    def fill(loads: list[int]) -> list[int]:
        steps = [_filled_up(rows) for rows in loads]
        cost = sum((rows + READ_ROWS) * row for rows in steps if rows)
        most_rows = min(BATCH_NUMBERS // width, max(sum(steps) // workers.parts(cost), CHUNK_ROWS))
        filled, start = [0] * len(loads), 0
        for first, count in _neighbours(steps, 0, len(steps), CALL // row, most_rows)[1]:
            largest = max(steps[first : first + count])
            filled[first : first + count] = [largest] * count
            for piece in _pieces(largest) if pieces and count == 1 else [largest]:
                found.append(Batch(first, count, piece, start))
                start += piece * count
        return filled

    routing = route(problem.top_k_index, problem.num_experts, fill)
    longest = max((batch.size for batch in found), default=0)
    return Batches(routing, found, longest, [batch.count * (batch.load + READ_ROWS) * row for batch in found])


def _neighbours(
    steps: list[int], first: int, stop: int, call: int, most_rows: int
) -> tuple[int, list[tuple[int, int]]]:
    """
    The cheapest way to halve experts that have `steps` rows again and again: what it takes, in rows, and first expert
    and count of each batch. A call takes as long as `call` rows. Only single experts may have more than `most_rows`.
    """
    some, count = steps[first:stop], stop - first
    largest = max(some, default=0)
    if not largest:
        return 0, []
    whole = call + count * (largest + READ_ROWS)
    possible = count == 1 or count * largest <= most_rows
    used = count - some.count(0)
    if possible and whole <= min(used, 2) * call + sum(some) + used * READ_ROWS:  # halves cannot be cheaper
        return whole, [(first, count)]
    middle = first + count // 2
    cost, left = _neighbours(steps, first, middle, call, most_rows)
    more, right = _neighbours(steps, middle, stop, call, most_rows)
    return (whole, [(first, count)]) if possible and whole <= cost + more else (cost + more, left + right)


def _filled_up(load: int) -> int:
    """To one of few numbers, by an eighth on average: a program for a new shape takes a thousandth of a second."""
    step = 8 if load <= 32 else max(16, 1 << ((load - 1).bit_length() - 3))
    return -(-load // step) * step


def _pieces(load: int) -> list[int]:
    """About CHUNK_ROWS each."""
    step = _filled_up(-(-load // -(-load // CHUNK_ROWS)))
    return [min(step, load - done) for done in range(0, load, step)]


def forward(problem: Problem, batches: Batches, keep: Tensor | None = None) -> Tensor:
    """The output (S, d), in the dtype of the products; `keep` (rows, 2i) is filled for the backward pass."""
    dtype, routing, first_proj, down_proj = problem.dtype, batches.routing, problem.first_proj, problem.down_proj
    hidden_states = routing.with_zeros(problem.hidden_states.to(dtype))
    width, inner_size = down_proj.shape[1:]
    outputs = memory.empty((routing.size + routing.missing, width), dtype)
    outputs[routing.size :] = 0
    weights = row_weights(problem, routing)

    def make_task():
        sizes = width, 0 if keep is not None else first_proj.shape[1], inner_size, width
        rows_buffer, *buffers = (torch.empty(batches.longest * size, dtype=dtype) for size in sizes)

        def task(index: int) -> None:
            batch = batches.parts[index]
            rows = _gather(hidden_states, batch, routing, rows_buffer)
            first_buffer = buffers[0] if keep is None else keep[batch.rows].view(-1)
            first = batch.columns(first_buffer, first_proj.shape[1])
            inner, product = batch.columns(buffers[1], inner_size), batch.columns(buffers[2], width)
            torch.bmm(first_proj[batch.experts].to(dtype), rows.transpose(1, 2), out=first)
            problem.activation.forward(first.transpose(1, 2), inner.transpose(1, 2))
            torch.bmm(down_proj[batch.experts].to(dtype), inner, out=product)
            _as_rows(product, outputs[batch.rows])
            outputs[batch.rows].mul_(weights[batch.rows])  # rounded row by row, as where rows are another process's

        return task

    workers.run(make_task, batches.costs)
    return combine(outputs, routing.places)


def backward(
    problem: Problem, batches: Batches, kept: Tensor, grad_output: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """As `experts.backward`, for `batches` without pieces."""
    dtype, routing, first_proj, down_proj = problem.dtype, batches.routing, problem.first_proj, problem.down_proj
    needs_hidden, needs_first, needs_down, needs_weights, *_ = needs
    hidden_states, grad_output = (
        routing.with_zeros(tokens.to(dtype)) for tokens in (problem.hidden_states, grad_output)
    )
    width, inner_size = down_proj.shape[1:]
    weights = row_weights(problem, routing)
    grad_first_proj = empty_gradient(first_proj, routing.experts) if needs_first else None
    grad_down_proj = empty_gradient(down_proj, routing.experts) if needs_down else None
    # the last row stands for experts that are not here
    grad_rows = torch.zeros(routing.size + 1 if needs_weights else 0, dtype=dtype)
    grad_hidden = memory.empty((routing.size + routing.missing if needs_hidden else 0, width), dtype)
    grad_hidden[routing.size :] = 0

    def make_task():
        sizes = width, inner_size, inner_size, inner_size, first_proj.shape[1], width if needs_hidden else 0
        rows_buffer, *buffers = (torch.empty(batches.longest * size, dtype=dtype) for size in sizes)

        def task(index: int) -> None:
            batch = batches.parts[index]
            weight = weights[batch.rows].view(batch.count, batch.load, 1)
            first = batch.columns(kept[batch.rows].view(-1), first_proj.shape[1])
            output, inner, grad = (batch.columns(buffer, inner_size) for buffer in buffers[:3])
            grads = _gather(grad_output, batch, routing, rows_buffer)
            torch.bmm(down_proj[batch.experts].to(dtype).transpose(1, 2), grads.transpose(1, 2), out=grad)
            problem.activation.forward(*(columns.transpose(1, 2) for columns in (first, output, inner)))
            if needs_weights:
                grad_rows[batch.rows] = torch.linalg.vecdot(grad, output, dim=1).view(-1)
            if grad_down_proj is not None:
                grads.mul_(weight)
                _product_into(grad_down_proj[batch.experts], grads.transpose(1, 2), output.transpose(1, 2))
            if not (needs_first or needs_hidden):
                return
            grad_first = batch.columns(buffers[3], first_proj.shape[1])
            grad.mul_(weight.transpose(1, 2))
            problem.activation.backward(*(columns.transpose(1, 2) for columns in (first, inner, grad, grad_first)))
            if needs_hidden:
                product = batch.columns(buffers[4], width)
                torch.bmm(first_proj[batch.experts].to(dtype).transpose(1, 2), grad_first, out=product)
                _as_rows(product, grad_hidden[batch.rows])
            if grad_first_proj is not None:
                rows = _gather(hidden_states, batch, routing, rows_buffer)
                _product_into(grad_first_proj[batch.experts], grad_first, rows)

        return task

    workers.run(make_task, batches.costs)
    grad_weights = None
    if needs_weights:
        grad_weights = grad_rows[routing.places].view(problem.top_k_index.shape).to(problem.top_k_weights.dtype)
    grad_tokens = combine(grad_hidden, routing.places).to(problem.hidden_states.dtype) if needs_hidden else None
    return grad_tokens, grad_first_proj, grad_down_proj, grad_weights


def _gather(tokens: Tensor, batch: Batch, routing: Routing, buffer: Tensor) -> Tensor:
    """The rows of a batch, (count, load, d)."""
    rows = buffer[: batch.size * tokens.shape[1]].view(batch.size, -1)
    torch.index_select(tokens, 0, routing.tokens[batch.rows], out=rows)
    return rows.view(batch.count, batch.load, -1)


def _as_rows(columns: Tensor, rows: Tensor) -> None:
    """Fill `rows` (count * load, d) with `columns` (count, d, load)."""
    rows.view(len(columns), -1, rows.shape[1]).copy_(columns.transpose(1, 2))


def _product_into(gradient: Tensor, left: Tensor, right: Tensor) -> None:
    """Fill `gradient` (count, a, b), of whatever dtype, with `left` (count, a, n) times `right` (count, n, b)."""
    if gradient.dtype == left.dtype:
        torch.bmm(left, right, out=gradient)
    else:
        gradient.copy_(torch.bmm(left, right))
