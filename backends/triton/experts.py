"""
The experts of an MoE layer in Triton, forward and backward, without waiting for the GPU: every size that depends on
the routing is bounded from above, and what lies beyond is skipped on the GPU. The three steps are custom operators,
into which torch.compile does not look: it runs what runs without it.
"""

from collections.abc import Callable, Sequence
from functools import wraps

import torch
import triton
from torch import Tensor

from ..derivatives import refuse_second
from ..problem import Problem
from . import kernels
from . import routing as routing_kernels
from .tiles import Tile, tiles_for


CHUNK = 128  # ids that a program of the routing has


def experts(problem: Problem) -> Tensor:
    """SwiGLU experts: (S, d), in the dtype of `hidden_states`."""
    # here: autograd converts the gradients
    inputs = (tensor.to(problem.dtype).contiguous() for tensor in problem.differentiable)
    routing = _route(problem.top_k_index, problem.num_experts, problem.dtype)
    output, _ = _experts(*inputs, *routing, problem.needs_gradients, problem.partial)
    return output.to(problem.hidden_states.dtype)


def _where_it_lies(function: Callable) -> Callable:
    """Launch on the GPU of the first tensor, which need not be the current one."""

    @wraps(function)
    def guarded(*args, **kwargs):
        with torch.cuda.device_of(args[0]):
            return function(*args, **kwargs)

    return guarded


@_where_it_lies
def route(top_k_index: Tensor, num_experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """
    Rows sorted by expert, and blocks of them for products in `dtype`.

    Returns:
        slots: which of the S * k ids each row is, `(rows,)`; rows of absent experts come last.
        ends: where the rows of each expert end, `(E,)`.
        blocks: the expert of each block, E where it is not needed, and its first row, `(blocks, 2)`.
    """
    ids = top_k_index.flatten()
    rows = len(ids)
    slots, ends, blocks = _routing(top_k_index, num_experts, dtype)
    size = tiles_for(rows, num_experts, dtype, ids.device).first.rows
    bins = triton.next_power_of_2(num_experts + 1)
    number = len(blocks)
    if 0 < rows <= CHUNK:
        routing_kernels.route_few[(1,)](
            ids, slots, ends, blocks, rows, number, num_experts, size, CHUNK, bins, triton.next_power_of_2(number)
        )
    elif rows:
        chunks = triton.cdiv(rows, CHUNK)
        counts = torch.empty(num_experts + 1, chunks, dtype=torch.int32, device=ids.device)
        routing_kernels.count[(chunks,)](ids, counts, rows, num_experts, CHUNK, bins)
        sums = counts.flatten().cumsum(0, dtype=torch.int32)
        routing_kernels.place[(max(chunks, num_experts + 1),)](
            ids, sums, slots, ends, blocks, rows, chunks, number, num_experts, size, CHUNK, bins, CHUNK
        )
    return slots, ends, blocks


def _routing(top_k_index: Tensor, num_experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rows = top_k_index.numel()
    size = tiles_for(rows, num_experts, dtype, top_k_index.device).first.rows
    blocks = min(rows, rows // size + num_experts)
    slots, ends, firsts = (
        top_k_index.new_empty(*shape, dtype=torch.int32) for shape in ((rows,), (num_experts,), (blocks, 2))
    )
    return slots, ends, firsts


_route = torch.library.custom_op("mhmoe::triton_route", route, mutates_args=())
_route.register_fake(_routing)


@_where_it_lies
def forward(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    top_k_weights: Tensor,
    slots: Tensor,
    ends: Tensor,
    blocks: Tensor,
    keep: bool,
    partial: bool,
) -> tuple[Tensor, Tensor]:
    """The output (S, d), and if it is to be kept for the way back the first product (rows, 2i)."""
    num_experts, width, inner_size = down_proj.shape
    rows, top_k = len(slots), top_k_weights.shape[1]
    first = _kept(hidden_states, down_proj, slots, keep)
    if not rows:
        return torch.zeros_like(hidden_states), first
    tiles = tiles_for(rows, num_experts, first.dtype, first.device)
    inner = hidden_states.new_empty(rows, inner_size)
    options = tiles.first.options(inner_size)
    kernels.first_product[_grid(blocks, inner_size, options)](
        hidden_states, gate_up_proj, first, inner, slots, ends, blocks, num_experts, width, inner_size, top_k, keep,
        _precision(first), **options,
    )  # fmt: skip
    routing = (slots, ends, blocks)
    return _scatter(inner, down_proj, routing, (inner_size, 1), top_k, partial, tiles.scattered, top_k_weights), first


def _kept(hidden_states: Tensor, down_proj: Tensor, slots: Tensor, keep: bool) -> Tensor:
    return hidden_states.new_empty(slots.shape[0] if keep else 0, 2 * down_proj.shape[2])


_experts = torch.library.custom_op("mhmoe::triton_experts", forward, mutates_args=())


@_experts.register_fake
def _(hidden_states, gate_up_proj, down_proj, top_k_weights, slots, ends, blocks, keep, partial):
    return torch.empty_like(hidden_states), _kept(hidden_states, down_proj, slots, keep)


@_where_it_lies
def backward(
    grad_output: Tensor,
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    top_k_weights: Tensor,
    first: Tensor,
    slots: Tensor,
    ends: Tensor,
    blocks: Tensor,
    partial: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the first four inputs; an empty tensor for what is not needed."""
    num_experts, width, inner_size = down_proj.shape
    rows, top_k = len(slots), top_k_weights.shape[1]
    inputs = (hidden_states, gate_up_proj, down_proj, top_k_weights)
    if not rows:
        grads = _gradients(inputs, needs)
        return grads[0].zero_(), grads[1].zero_(), grads[2].zero_(), grads[3].zero_()
    routing, precision = (slots, ends, blocks), _precision(first)
    tiles = tiles_for(rows, num_experts, first.dtype, first.device)
    options = tiles.inner.options(inner_size)
    grid = _grid(blocks, inner_size, options)
    grad_first, inner = torch.empty_like(first), first.new_empty(rows, inner_size)
    make = torch.zeros if partial else torch.empty
    sums = make(rows, grid[0] // len(blocks), dtype=torch.float32, device=first.device)
    kernels.inner_gradient[grid](
        grad_output, down_proj, first, top_k_weights, grad_first, inner, sums, slots, ends, blocks, num_experts,
        width, inner_size, top_k, precision, **options,
    )  # fmt: skip
    grads = [first.new_empty(0) for _ in inputs]
    if needs[0]:
        grads[0] = _scatter(grad_first, gate_up_proj, routing, (1, width), top_k, partial, tiles.scattered)
    if needs[1]:
        grads[1] = torch.empty_like(gate_up_proj)
        _sum_rows(grad_first, hidden_states, grads[1], routing, (width, 1), top_k, tiles.weights)
    if needs[2]:
        grads[2] = torch.empty_like(down_proj)
        _sum_rows(inner, grad_output, grads[2], routing, (1, inner_size), top_k, tiles.weights)
    if needs[3]:
        grads[3] = sums.sum(1).to(first.dtype).view(top_k_weights.shape)
    return grads[0], grads[1], grads[2], grads[3]


_experts_backward = torch.library.custom_op("mhmoe::triton_experts_backward", backward, mutates_args=())


@_experts_backward.register_fake
def _(grad_output, hidden_states, gate_up_proj, down_proj, top_k_weights, first, slots, ends, blocks, partial, needs):
    inputs = (hidden_states, gate_up_proj, down_proj, top_k_weights)
    return _gradients(inputs, needs)


def _gradients(inputs: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """To be filled; empty for what is not needed."""
    return tuple(
        torch.empty_like(tensor) if needed else tensor.new_empty(0)
        for tensor, needed in zip(inputs, needs, strict=True)
    )


def _setup_context(ctx, inputs, output):
    *tensors, _, ctx.partial = inputs
    ctx.save_for_backward(*tensors[:4], output[1], *tensors[4:])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_output, _):
    needs = list(ctx.needs_input_grad[:4])
    with torch.no_grad():
        grads = _experts_backward(grad_output.contiguous(), *ctx.saved_tensors, ctx.partial, needs)
    grads = [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]
    return *refuse_second(grads, grad_output, *ctx.saved_tensors[:4]), None, None, None, None, None


_experts.register_autograd(_backward, setup_context=_setup_context)


def _scatter(
    left: Tensor,
    weight: Tensor,
    routing: tuple[Tensor, Tensor, Tensor],
    strides: tuple[int, int],
    top_k: int,
    partial: bool,
    tile: Tile,
    top_k_weights: Tensor | None = None,
) -> Tensor:
    """
    Rows (rows, n) times their expert's matrix, whose `strides` are those of columns and depth, times their weight,
    and the sum over the rows of a token: (S, d).
    """
    slots, ends, blocks = routing
    columns = weight.numel() // len(weight) // left.shape[1]
    # what belongs to experts of another process adds nothing
    output = (left.new_zeros if partial else left.new_empty)(len(slots), columns)
    options = tile.options(columns)
    kernels.scattered_product[_grid(blocks, columns, options)](
        left, weight, output, slots, left if top_k_weights is None else top_k_weights, ends, blocks, len(weight),
        columns, left.shape[1], *strides, top_k_weights is not None, _precision(left), **options,
    )  # fmt: skip
    return output.view(-1, top_k, columns).sum(1, dtype=left.dtype)  # a dtype that autocast leaves alone


def _sum_rows(
    left: Tensor,
    source: Tensor,
    output: Tensor,
    routing: tuple[Tensor, Tensor, Tensor],
    strides: tuple[int, int],
    top_k: int,
    tile: Tile,
) -> None:
    """Fill `output` with each expert's sum over its rows, of (rows, n) times the token's row of (S, d)."""
    slots, ends, _ = routing
    high, wide = left.shape[1], source.shape[1]
    options = tile.options(wide)
    grid = (len(ends) * triton.cdiv(high, options["ROWS"]) * triton.cdiv(wide, options["COLUMNS"]),)
    kernels.weight_gradient[grid](
        left, source, output, slots, ends, high, wide, *strides, top_k, _precision(left), **options
    )


def _grid(blocks: Tensor, columns: int, options: dict[str, int]) -> tuple[int]:
    return (len(blocks) * triton.cdiv(columns, options["COLUMNS"]),)


def _precision(tensor: Tensor) -> str:
    """What a product of float32 is made in: as torch's own."""
    return "tf32" if tensor.is_cuda and torch.backends.cuda.matmul.allow_tf32 else "ieee"
