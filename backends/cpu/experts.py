"""
The experts of an MoE layer on CPU, forward and backward.

S tokens of d numbers, of which each goes to k of E experts; i is an expert's inner size, and the first product is 2i
wide where experts have gates, else i. A thread takes an expert: it gathers the expert's tokens, and takes them through
all products in buffers that stay in its cache. The gradient of an expert's matrix is written straight to its place in
that of all experts.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from ..derivatives import refuse_second
from ..problem import Problem
from . import columns, few_rows, grouped, memory, native, workers
from .choices import native_pays, row_cost
from .products import Chunk, Products, narrow_rows, product_into
from .routing import Routing, by_steps, combine, empty_gradient, route, row_weights
from .tuning import CHUNK_ROWS, READ_ROWS, STEP_ROWS


def experts(problem: Problem) -> Tensor:
    """(S, d), in the dtype of `hidden_states`."""
    with torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext():
        if problem.needs_gradients:
            return _Experts.apply(*problem.differentiable, problem.top_k_index, problem.activation, problem.dtype)
        return inference(problem)


def inference(problem: Problem) -> Tensor:
    """The output alone, in the dtype of `hidden_states`."""
    if native_pays(problem) and native.can(problem):
        output = native.forward(problem)
    elif (ids := few_rows.ids_if_few(problem)) is not None:
        output = few_rows.forward(problem, ids)
    elif columns.suit(problem, with_gradients=False):
        output = columns.forward(problem, columns.divide(problem, pieces=True))
    elif grouped.suit(problem, with_gradients=False):
        output, _ = grouped.forward(problem, grouped.sort(problem))
    else:
        output = forward(problem, _route(problem))
    return output.to(problem.hidden_states.dtype)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        problem, order, kept = Problem(*inputs), None, None
        if native_pays(problem, with_gradients=True) and native.can(problem):
            output, backward_pass = native.forward(problem), native.backward
        elif columns.suit(problem, with_gradients=True):
            order, backward_pass = columns.divide(problem, pieces=False), columns.backward
            kept = _to_keep(problem, order.routing.size)
            output = columns.forward(problem, order, kept)
        elif grouped.suit(problem, with_gradients=True):
            order, backward_pass = grouped.sort(problem), grouped.backward
            output, kept = grouped.forward(problem, order)
        else:
            order, backward_pass = _route(problem), backward
            kept = _to_keep(problem, order.size)
            output = forward(problem, order, kept)
        ctx.save_for_backward(*problem.differentiable, *([] if kept is None else [kept]))
        ctx.order = [] if order is None else [order]
        ctx.others, ctx.backward_pass = inputs[4:], backward_pass
        return output.to(problem.hidden_states.dtype)

    @staticmethod
    def backward(ctx, grad_output):  # ty: ignore[incompatible-method-override]: torch's stub takes any number
        saved = ctx.saved_tensors
        tensors, kept = saved[:4], saved[4:]
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            problem = Problem(*tensors, *ctx.others)
            grads = ctx.backward_pass(problem, *ctx.order, *kept, grad_output, ctx.needs_input_grad)
        return *refuse_second(grads, grad_output, *tensors), None, None, None


def _to_keep(problem: Problem, rows: int) -> Tensor:
    """Memory of the first product."""
    return memory.empty((rows, problem.first_proj.shape[1]), problem.dtype)


def _route(problem: Problem) -> Routing:
    return route(problem.top_k_index, problem.num_experts, by_steps(problem.dtype))


def forward(problem: Problem, routing: Routing, keep: Tensor | None = None) -> Tensor:
    """The output, in the dtype of the products; `keep` (rows, 2i) is filled with the first product."""
    dtype, activation, first_proj, down_proj = problem.dtype, problem.activation, problem.first_proj, problem.down_proj
    hidden_states = routing.with_zeros(problem.hidden_states.to(dtype))
    outputs = memory.empty((routing.size + routing.missing, hidden_states.shape[-1]), dtype)
    outputs[routing.size :] = 0
    weights = row_weights(problem, routing)
    row = row_cost(problem)
    chunks = _chunks(routing, True, row)
    longest, narrow = max((chunk.size for chunk in chunks), default=0), narrow_rows(dtype)

    def make_task():
        times_first, times_down = (Products(proj.transpose(1, 2), dtype, narrow) for proj in (first_proj, down_proj))
        rows_buffer = hidden_states.new_empty(longest, hidden_states.shape[-1])
        first_buffer = hidden_states.new_empty(longest if keep is None else 0, first_proj.shape[1])
        inner_buffer = hidden_states.new_empty(longest, down_proj.shape[2])

        def task(index: int) -> None:
            chunk = chunks[index]
            rows = torch.index_select(hidden_states, 0, routing.tokens[chunk.rows], out=rows_buffer[: chunk.size])
            first = first_buffer[: chunk.size] if keep is None else keep[chunk.rows]
            inner = inner_buffer[: chunk.size]
            times_first(rows, chunk, first)
            activation.forward(first, inner)
            products = outputs[chunk.rows]
            times_down(inner, chunk, products)
            # rounded row by row, as where rows come back from experts of other processes
            products.mul_(weights[chunk.rows])

        return task

    workers.run(make_task, [_cost(chunk.size, len(chunk.experts), row) for chunk in chunks])
    return combine(outputs, routing.places)


def backward(
    problem: Problem, routing: Routing, kept: Tensor, grad_output: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """
    Gradients of the problem's four differentiable tensors, as far as `needs` says so.

    Args:
        kept: the first product (rows, 2i), as `forward` filled it in.
        grad_output: of the output, (S, d).
    """
    dtype, activation, first_proj, down_proj = problem.dtype, problem.activation, problem.first_proj, problem.down_proj
    needs_hidden, needs_first, needs_down, needs_weights, *_ = needs
    hidden_states, grad_output = (
        routing.with_zeros(tokens.to(dtype)) for tokens in (problem.hidden_states, grad_output)
    )
    weights = row_weights(problem, routing)
    grad_first_proj = empty_gradient(first_proj, routing.experts) if needs_first else None
    grad_down_proj = empty_gradient(down_proj, routing.experts) if needs_down else None
    # the last row stands for experts that are not here
    grad_rows = hidden_states.new_zeros(routing.size + 1 if needs_weights else 0)
    size = routing.size + routing.missing if needs_hidden else 0
    grad_hidden = memory.empty((size, hidden_states.shape[-1]), dtype)
    grad_hidden[routing.size :] = 0
    # the longest first, so that no thread is left with it at the end
    row = row_cost(problem)
    chunks = sorted(_chunks(routing, False, row), key=lambda chunk: -chunk.size)
    longest, narrow = chunks[0].size if chunks else 0, narrow_rows(dtype)

    def make_task():
        times_first, times_down = Products(first_proj, dtype, narrow), Products(down_proj, dtype, narrow)
        rows_buffer, grads_buffer = (hidden_states.new_empty(longest, hidden_states.shape[-1]) for _ in range(2))
        output_buffer, inner_buffer, grad_buffer = (
            hidden_states.new_empty(longest, down_proj.shape[2]) for _ in range(3)
        )
        grad_first_buffer = hidden_states.new_empty(longest, first_proj.shape[1])

        def task(index: int) -> None:
            chunk = chunks[index]
            size, tokens, first, weight = chunk.size, routing.tokens[chunk.rows], kept[chunk.rows], weights[chunk.rows]
            output, inner, grad = output_buffer[:size], inner_buffer[:size], grad_buffer[:size]
            grads = torch.index_select(grad_output, 0, tokens, out=grads_buffer[:size])
            times_down(grads, chunk, grad)
            activation.forward(first, output, inner)
            if needs_weights:
                torch.linalg.vecdot(grad, output, out=grad_rows[chunk.rows])
            if grad_down_proj is not None:
                grads.mul_(weight)
                for expert, left, right in zip(chunk.experts, chunk.split(grads), chunk.split(output), strict=True):
                    product_into(grad_down_proj[expert], left, right)
            if not (needs_first or needs_hidden):
                return
            grad_first = grad_first_buffer[:size]
            activation.backward(first, inner, grad.mul_(weight), grad_first)
            if needs_hidden:
                times_first(grad_first, chunk, grad_hidden[chunk.rows])
            if grad_first_proj is not None:
                rows = torch.index_select(hidden_states, 0, tokens, out=rows_buffer[:size])
                for expert, left, right in zip(chunk.experts, chunk.split(grad_first), chunk.split(rows), strict=True):
                    product_into(grad_first_proj[expert], left, right)

        return task

    workers.run(make_task, [_cost(chunk.size, len(chunk.experts), row) for chunk in chunks])
    grad_weights = None
    if needs_weights:
        grad_weights = grad_rows[routing.places].view(problem.top_k_index.shape).to(problem.top_k_weights.dtype)
    grad_tokens = combine(grad_hidden, routing.places).to(problem.hidden_states.dtype) if needs_hidden else None
    return grad_tokens, grad_first_proj, grad_down_proj, grad_weights


def _chunks(routing: Routing, split: bool, row: int) -> list[Chunk]:
    """Chunks of about CHUNK_ROWS, more where an expert has more and may not be `split`; as much for each thread."""
    parts = workers.parts(_cost(routing.size, len(routing.experts), row))
    count = max(min(parts, routing.size // READ_ROWS), -(-routing.size // CHUNK_ROWS))
    if count > 1:
        threads = torch.get_num_threads()
        count = -(-count // threads) * threads
    chunks, start, size, share = [], 0, 0, 0
    experts, loads = [], []
    for expert, load in zip(routing.experts, routing.loads, strict=True):
        # pieces of about the same size, and of few different ones
        pieces = -(-load // CHUNK_ROWS) if split else 1
        step = -(-load // pieces // STEP_ROWS) * STEP_ROWS
        for done in range(0, load, step):
            here = min(load - done, step)
            # Which of `count` equal shares of the rows the middle of this piece falls into. A chunk of a little more
            # than CHUNK_ROWS is better than one of a small rest.
            before, share = share, (2 * (start + size) + here) * count // (2 * routing.size)
            if experts and (share != before or size + here > 1.25 * CHUNK_ROWS):
                chunks.append(Chunk(start, experts, loads))
                start, size, experts, loads = start + size, 0, [], []
            experts.append(expert)
            loads.append(here)
            size += here
    return [*chunks, Chunk(start, experts, loads)] if experts else chunks


def _cost(rows: int, experts: int, row: int) -> int:
    return (rows + experts * READ_ROWS) * row
