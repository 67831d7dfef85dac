"""
The experts of an MoE layer on CPU, forward and backward.

S tokens of d numbers, of which each goes to k of E experts; i is an expert's inner size, and the first product is 2i
wide where experts have gates, else i. A thread takes an expert: it gathers the expert's tokens, and takes them through
all products in buffers that stay in its cache. The gradient of an expert's matrix is written straight to its place in
that of all experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from . import workers
from .gates import ModuleGate, SiluGate
from .routing import Routing, route


BLOCK = 256  # rows that pass through an expert together: enough for the products, not too many for the cache


def experts(
    hidden_states: Tensor,
    first_proj: Tensor,
    down_proj: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate: SiluGate | ModuleGate,
) -> Tensor:
    """
    Args:
        hidden_states: (S, d).
        first_proj: (E, 2i, d) or (E, i, d).
        down_proj: (E, d, i).
        top_k_index: (S, k); from E on, experts that another process has, which add nothing.
        top_k_weights: (S, k).
        gate: what stands between the two products.

    Returns:
        (S, d), in the dtype of `hidden_states`. Products are in autocast's dtype where it is on, else in the weights'.
    """
    dtype = product_dtype(first_proj)
    inputs = (hidden_states, first_proj, down_proj, top_k_weights)
    with torch.autocast("cpu", enabled=False):
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
            return _Experts.apply(*inputs, top_k_index, gate, dtype)
        routing = route(top_k_index, len(first_proj), dtype)
        return forward(*inputs, routing, gate, dtype).to(hidden_states.dtype)


def product_dtype(first_proj: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else first_proj.dtype


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, first_proj, down_proj, top_k_weights, top_k_index, gate, dtype):
        ctx.routing = routing = route(top_k_index, len(first_proj), dtype)
        ctx.gate, ctx.dtype = gate, dtype
        first = torch.empty(routing.size, first_proj.shape[1], dtype=dtype)
        output = forward(hidden_states, first_proj, down_proj, top_k_weights, routing, gate, dtype, first)
        ctx.save_for_backward(hidden_states, first_proj, down_proj, top_k_weights, first)
        return output.to(hidden_states.dtype)

    @staticmethod
    def backward(ctx, grad_output):
        saved = ctx.saved_tensors
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            grads = backward(grad_output, *saved, ctx.routing, ctx.gate, ctx.dtype, ctx.needs_input_grad)
        if torch.is_grad_enabled():  # create_graph=True
            grads = (None if grad is None else _NoSecond.apply(grad, grad_output, *saved[:4]) for grad in grads)
        return *grads, None, None, None


class _NoSecond(torch.autograd.Function):
    """The first tensor, as one that depends on all; torch's `once_differentiable` overlooks those that were saved."""

    @staticmethod
    def forward(ctx, gradient, *causes):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, grad_output):
        raise RuntimeError("experts_implementation='subtoken' has no second derivatives; choose grouped_mm or eager.")


def forward(
    hidden_states: Tensor,
    first_proj: Tensor,
    down_proj: Tensor,
    top_k_weights: Tensor,
    routing: Routing,
    gate: SiluGate | ModuleGate,
    dtype: torch.dtype,
    keep: Tensor | None = None,
) -> Tensor:
    """The output; `keep` (rows with spare ones, 2i) is filled with the first product."""
    hidden_states = hidden_states.to(dtype)
    outputs = torch.empty(routing.size + routing.missing, hidden_states.shape[-1], dtype=dtype)
    outputs[routing.size :] = 0
    sizes = hidden_states.shape[-1], first_proj.shape[1], down_proj.shape[2]
    blocks = _blocks(routing)
    longest = max((block.padded for block in blocks), default=0)

    def make_task():
        first_of, down_of = _Matrices(first_proj, dtype), _Matrices(down_proj, dtype)
        rows_buffer, first_buffer, inner_buffer = (
            hidden_states.new_empty(longest if needed else 0, size)
            for size, needed in zip(sizes, (True, keep is None, True), strict=True)
        )

        def task(index: int) -> None:
            block = blocks[index]
            rows = _gather(hidden_states, routing.tokens[block.rows], rows_buffer[: block.padded])
            first = first_buffer[: block.padded] if keep is None else keep[block.places]
            inner = inner_buffer[: block.padded]
            torch.mm(rows, first_of(block.expert).t(), out=first)
            gate.forward(first, inner)
            torch.mm(inner, down_of(block.expert).t(), out=outputs[block.places])

        return task

    workers.run(make_task, _costs(blocks, first_proj))
    return _combine(outputs, routing.places, top_k_weights.to(dtype))


def backward(
    grad_output: Tensor,
    hidden_states: Tensor,
    first_proj: Tensor,
    down_proj: Tensor,
    top_k_weights: Tensor,
    kept: Tensor,
    routing: Routing,
    gate: SiluGate | ModuleGate,
    dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of the first four tensors, as far as `needs` says so."""
    needs_hidden, needs_first, needs_down, needs_weights, *_ = needs
    hidden_dtype, hidden_states = hidden_states.dtype, hidden_states.to(dtype)
    grad_output = grad_output.to(dtype)
    weights = top_k_weights.to(dtype).reshape(-1)[routing.slots, None]  # (rows, 1)
    grad_first_proj = _empty_gradient(first_proj, routing) if needs_first else None
    grad_down_proj = _empty_gradient(down_proj, routing) if needs_down else None
    grad_weights = torch.zeros_like(top_k_weights, memory_format=torch.contiguous_format) if needs_weights else None
    grad_rows = torch.empty_like(weights)
    grad_hidden = None
    if needs_hidden:
        grad_hidden = hidden_states.new_empty(routing.size + routing.missing, hidden_states.shape[-1])
        grad_hidden[routing.size :] = 0
    # the longest first, so that no thread is left with it at the end
    whole = sorted(_blocks(routing, most=None), key=lambda block: -block.padded)
    longest = whole[0].padded if whole else 0

    def make_task():
        first_of, down_of = _Matrices(first_proj, dtype), _Matrices(down_proj, dtype)
        rows_buffer, grads_buffer = (hidden_states.new_empty(longest, hidden_states.shape[-1]) for _ in range(2))
        output_buffer, inner_buffer, grad_buffer = (
            hidden_states.new_empty(longest, down_proj.shape[2]) for _ in range(3)
        )
        grad_first_buffer = hidden_states.new_empty(longest, first_proj.shape[1])

        def task(index: int) -> None:
            block = whole[index]
            expert, load, padded = block.expert, block.load, block.padded
            tokens = routing.tokens[block.rows]
            first = kept[block.places]
            output, inner, grad = output_buffer[:padded], inner_buffer[:padded], grad_buffer[:padded]
            grads = _gather(grad_output, tokens, grads_buffer[:padded])
            torch.mm(grads, down_of(expert), out=grad)
            gate.forward(first, output, inner)
            if needs_weights:
                torch.linalg.vecdot(grad[:load], output[:load], out=grad_rows[block.rows, 0])
            if needs_down:
                grads[:load].mul_(weights[block.rows])
                _product_into(grad_down_proj[expert], grads, output)
            if needs_first or needs_hidden:
                grad[:load].mul_(weights[block.rows])
                grad_first = grad_first_buffer[:padded]
                gate.backward(first, inner, grad, grad_first)
                if needs_hidden:
                    torch.mm(grad_first, first_of(expert), out=grad_hidden[block.places])
                if needs_first:
                    rows = _gather(hidden_states, tokens, rows_buffer[:padded])
                    _product_into(grad_first_proj[expert], grad_first, rows)

        return task

    workers.run(make_task, _costs(whole, first_proj))
    if needs_weights:
        grad_weights.view(-1)[routing.slots] = grad_rows[:, 0].to(grad_weights.dtype)
    if needs_hidden:
        grad_hidden = _combine(grad_hidden, routing.places).to(hidden_dtype)
    return grad_hidden, grad_first_proj, grad_down_proj, grad_weights


class _Matrices:
    """The matrix of each expert, in the dtype of the products."""

    def __init__(self, weights: Tensor, dtype: torch.dtype):
        self.weights = weights
        self.buffer = None if weights.dtype == dtype else torch.empty(weights.shape[1:], dtype=dtype)

    def __call__(self, expert: int) -> Tensor:
        weight = self.weights[expert]
        return weight if self.buffer is None else self.buffer.copy_(weight)


@dataclass
class _Block:
    """Rows of one expert that are done together; `rows` of the sorted rows, `places` in a buffer with spare rows."""

    expert: int
    load: int
    padded: int
    rows: slice
    places: slice


def _blocks(routing: Routing, most: int | None = BLOCK) -> list[_Block]:
    blocks = []
    for expert, load, first, padded, start in zip(
        routing.experts, routing.loads, routing.firsts, routing.padded, routing.starts, strict=True
    ):
        step = most or load
        for done in range(0, load, step):
            here, padded_here = min(load - done, step), min(padded - done, step) if most else padded
            rows = slice(first + done, first + done + here)
            places = slice(start + done, start + done + padded_here)
            blocks.append(_Block(expert, here, padded_here, rows, places))
    return blocks


def _costs(blocks: list[_Block], first_proj: Tensor) -> list[int]:
    return [(block.padded + workers.READ) * first_proj[0].numel() for block in blocks]


def _gather(tensor: Tensor, tokens: Tensor, buffer: Tensor) -> Tensor:
    """Those rows, then zeros."""
    torch.index_select(tensor, 0, tokens, out=buffer[: len(tokens)])
    if len(buffer) > len(tokens):
        buffer[len(tokens) :].zero_()
    return buffer


def _combine(rows: Tensor, places: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sums, weighted or not, of the `rows` at `places` (S, k): (S, d)."""
    output = rows.new_empty(len(places), rows.shape[-1])
    if len(places) < 256:
        return F.embedding_bag(places, rows, mode="sum", per_sample_weights=weights) if len(places) else output
    chunks = 4 * torch.get_num_threads()
    spans = list(pairwise(len(places) * chunk // chunks for chunk in range(chunks + 1)))

    def task(index: int) -> None:
        start, end = spans[index]
        weights_here = None if weights is None else weights[start:end]
        output[start:end] = F.embedding_bag(places[start:end], rows, mode="sum", per_sample_weights=weights_here)

    workers.run(lambda: task, [rows.shape[-1] * places.numel() * workers.READ // chunks] * chunks)
    return output


def _empty_gradient(parameter: Tensor, routing: Routing) -> Tensor:
    """Of a parameter's shape, and zero for the experts that have no rows; the others are left to be written."""
    gradient = torch.empty_like(parameter)
    reached = set(routing.experts)
    for expert in range(len(parameter)):
        if expert not in reached:
            gradient[expert].zero_()
    return gradient


def _product_into(gradient: Tensor, left: Tensor, right: Tensor) -> None:
    if gradient.dtype == left.dtype:
        torch.mm(left.t(), right, out=gradient)
    else:
        gradient.copy_(left.t() @ right)
