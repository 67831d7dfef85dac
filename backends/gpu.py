"""
The experts of an MoE layer in Triton, forward and backward, without waiting for the GPU: every size that depends on
the routing is bounded from above, and what lies beyond is skipped on the GPU.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from . import triton_kernels as kernels
from .derivatives import refuse_second


COLUMNS, DEPTH = 64, 32  # of a program's block of a product
FULL = 64  # rows an expert has on average from which on blocks of rows are large


@dataclass
class Routing:
    """
    Rows sorted by expert, and blocks of them.

    Attributes:
        slots: which of the S * k weights belongs to each row, `(rows,)`; rows of absent experts come last.
        tokens: the token of each row, `(rows,)`.
        ends: where the rows of each expert end, `(E,)`.
        experts: of each block, `(blocks,)`; E for blocks that are not needed.
        starts: first row of each block, `(blocks,)`.
        size: rows of a block.
    """

    slots: Tensor
    tokens: Tensor
    ends: Tensor
    experts: Tensor
    starts: Tensor
    size: int


def route(top_k_index: Tensor, num_experts: int) -> Routing:
    ids = top_k_index.flatten().clamp(max=num_experts)
    rows = ids.numel()
    slots = torch.sort(ids, stable=True).indices
    loads = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    loads = loads.scatter_add_(0, ids, torch.ones_like(ids))[:num_experts]
    ends = loads.cumsum(0)
    size = 64 if rows >= FULL * num_experts else 16
    blocks_of = (loads + size - 1) // size
    last_blocks = blocks_of.cumsum(0)
    blocks = torch.arange(rows // size + num_experts, device=ids.device)
    experts = torch.searchsorted(last_blocks, blocks, right=True)
    expert = experts.clamp(max=num_experts - 1)
    starts = (ends - loads)[expert] + (blocks - (last_blocks - blocks_of)[expert]) * size
    return Routing(slots, slots // max(top_k_index.shape[-1], 1), ends, experts, starts, size)


def experts(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    partial: bool,
) -> Tensor:
    """
    SwiGLU experts: (S, d), (E, 2i, d), (E, d, i), (S, k), (S, k) -> (S, d). Products are in autocast's dtype where it
    is on, else in the weights'. `partial` allows ids from E on, of experts that another process has.
    """
    device_type = hidden_states.device.type
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else gate_up_proj.dtype
    inputs = (hidden_states, gate_up_proj, down_proj, top_k_weights)
    inputs = tuple(tensor.to(dtype) for tensor in inputs)  # outside the function: the way back converts gradients
    with torch.autocast(device_type, enabled=False):
        return _Experts.apply(*inputs, top_k_index, partial).to(hidden_states.dtype)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, gate_up_proj, down_proj, top_k_weights, top_k_index, partial):
        hidden_states, gate_up_proj, down_proj = (
            tensor.contiguous() for tensor in (hidden_states, gate_up_proj, down_proj)
        )
        num_experts, width, inner_size = down_proj.shape
        routing = route(top_k_index, num_experts)
        row_weights = top_k_weights.flatten()[routing.slots]
        rows = len(routing.slots)
        keep = any(ctx.needs_input_grad)
        first = hidden_states.new_empty(rows if keep else 0, 2 * inner_size)
        inner = hidden_states.new_empty(rows, inner_size)
        grid = (len(routing.experts), triton.cdiv(inner_size, COLUMNS))
        if rows:
            kernels.first_product[grid](
                hidden_states, gate_up_proj, first, inner, routing.tokens, routing.ends, routing.experts,
                routing.starts, width, inner_size, num_experts, keep, _precision(first), routing.size, COLUMNS, DEPTH,
            )  # fmt: skip
        outputs = _scatter(inner, down_proj, routing, (inner_size, 1), width, partial, row_weights)
        ctx.save_for_backward(hidden_states, gate_up_proj, down_proj, row_weights, first)
        ctx.routing, ctx.partial, ctx.shape = routing, partial, top_k_weights.shape
        return outputs.view(len(hidden_states), -1, width).sum(1) if rows else torch.zeros_like(hidden_states)

    @staticmethod
    def backward(ctx, grad_output):
        with torch.no_grad():
            grads = _Experts.gradients(ctx, grad_output)
        return refuse_second(grads, grad_output, *ctx.saved_tensors[:4])

    @staticmethod
    def gradients(ctx, grad_output):
        hidden_states, gate_up_proj, down_proj, row_weights, first = ctx.saved_tensors
        routing, precision = ctx.routing, _precision(first)
        num_experts, width, inner_size = down_proj.shape
        rows = len(routing.slots)
        if not rows:
            grads = (hidden_states, gate_up_proj, down_proj, row_weights.view(ctx.shape))
            return *(torch.zeros_like(tensor) for tensor in grads), None, None
        grad_output = grad_output.contiguous()
        parts = triton.cdiv(inner_size, COLUMNS)
        grad_first, inner = torch.empty_like(first), first.new_empty(rows, inner_size)
        grad_rows = first.new_zeros(rows, parts, dtype=torch.float32)
        kernels.inner_gradient[(len(routing.experts), parts)](
            grad_output, down_proj, first, row_weights, grad_first, inner, grad_rows, routing.tokens, routing.ends,
            routing.experts, routing.starts, width, inner_size, num_experts, parts, precision, routing.size, COLUMNS,
            DEPTH,
        )  # fmt: skip
        grad_hidden = grad_gate_up = grad_down = grad_weights = None
        if ctx.needs_input_grad[0]:
            grads = _scatter(grad_first, gate_up_proj, routing, (1, width), width, ctx.partial)
            grad_hidden = grads.view(len(hidden_states), -1, width).sum(1)
        if ctx.needs_input_grad[1]:
            grad_gate_up = torch.empty_like(gate_up_proj)
            _sum_rows(grad_first, hidden_states, grad_gate_up, routing, (width, 1))
        if ctx.needs_input_grad[2]:
            grad_down = torch.empty_like(down_proj)
            _sum_rows(inner, grad_output, grad_down, routing, (1, inner_size))
        if ctx.needs_input_grad[3]:
            sums = grad_rows.sum(1).to(row_weights.dtype)
            grad_weights = torch.empty_like(sums).index_copy_(0, routing.slots, sums).view(ctx.shape)
        return grad_hidden, grad_gate_up, grad_down, grad_weights, None, None


def _scatter(
    left: Tensor,
    weight: Tensor,
    routing: Routing,
    strides: tuple[int, int],
    columns: int,
    partial: bool,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Rows times their expert's matrix, whose `strides` are those of columns and depth, in the order of the slots."""
    make = left.new_zeros if partial else left.new_empty
    output = make(len(routing.slots), columns)
    if len(routing.slots):
        kernels.scattered_product[(len(routing.experts), triton.cdiv(columns, COLUMNS))](
            left, weight, output, routing.slots, left if row_weights is None else row_weights, routing.ends,
            routing.experts, routing.starts, columns, left.shape[1], len(routing.ends), weight.stride(0), *strides,
            row_weights is not None, _precision(left), routing.size, COLUMNS, DEPTH,
        )  # fmt: skip
    return output


def _sum_rows(left: Tensor, source: Tensor, output: Tensor, routing: Routing, strides: tuple[int, int]) -> None:
    high, wide = left.shape[1], source.shape[1]
    grid = (len(routing.ends), triton.cdiv(high, COLUMNS), triton.cdiv(wide, COLUMNS))
    kernels.weight_gradient[grid](
        left, source, output, routing.tokens, routing.ends, high, wide, *strides, _precision(left), COLUMNS, COLUMNS,
        DEPTH,
    )  # fmt: skip


def _precision(tensor: Tensor) -> str:
    """What a product of float32 is made in: as torch's own."""
    return "tf32" if tensor.is_cuda and torch.backends.cuda.matmul.allow_tf32 else "ieee"
