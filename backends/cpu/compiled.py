"""
The CPU experts in a graph of torch.compile: as one operator, or for a few rows without gradients as plain arithmetic,
of which its compiler makes one loop that reads the experts where they lie.
"""

import torch
from torch import Tensor

from . import cpu
from .gates import ModuleGate, SiluGate
from .routing import route, spare_rows


ROWS_16_BIT, ROWS = 3.2, 1.7  # of each expert on average, up to which that loop over single rows is the fastest


@torch.library.custom_op("mhmoe::subtoken_experts", mutates_args=())
def _experts(
    hidden_states: Tensor,
    first_proj: Tensor,
    down_proj: Tensor,
    top_k_weights: Tensor,
    top_k_index: Tensor,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    # one size for all routings, since a graph's shapes do not depend on numbers
    first = _kept(top_k_index, first_proj, dtype, keep)
    inputs = (hidden_states, first_proj, down_proj, top_k_weights)
    if not keep:
        return cpu.inference(*inputs, top_k_index, SiluGate(), dtype), first
    routing = route(top_k_index, len(first_proj), dtype)
    return cpu.forward(*inputs, routing, SiluGate(), dtype, first).to(hidden_states.dtype), first


@_experts.register_fake
def _(hidden_states, first_proj, down_proj, top_k_weights, top_k_index, dtype, keep):
    return torch.empty_like(hidden_states).contiguous(), _kept(top_k_index, first_proj, dtype, keep)


def _kept(top_k_index: Tensor, first_proj: Tensor, dtype: torch.dtype, keep: bool) -> Tensor:
    rows = top_k_index.numel() + spare_rows(len(first_proj), dtype) if keep else 0
    return first_proj.new_empty(rows, first_proj.shape[1], dtype=dtype)


@torch.library.custom_op("mhmoe::subtoken_experts_backward", mutates_args=())
def _experts_backward(
    grad_output: Tensor,
    hidden_states: Tensor,
    first_proj: Tensor,
    down_proj: Tensor,
    top_k_weights: Tensor,
    first: Tensor,
    top_k_index: Tensor,
    dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    routing = route(top_k_index, len(first_proj), dtype)
    inputs = (hidden_states, first_proj, down_proj, top_k_weights)
    grads = cpu.backward(grad_output, *inputs, first, routing, SiluGate(), dtype, needs)
    # an operator returns tensors; what is not needed is an empty one
    return tuple(grad_output.new_empty(0) if grad is None else grad for grad in grads)


@_experts_backward.register_fake
def _(grad_output, hidden_states, first_proj, down_proj, top_k_weights, first, top_k_index, dtype, needs):
    inputs = (hidden_states, first_proj, down_proj, top_k_weights)
    contiguous = (True, False, False, True)
    return tuple(
        (torch.empty_like(tensor).contiguous() if whole else torch.empty_like(tensor))
        if needed
        else grad_output.new_empty(0)
        for tensor, needed, whole in zip(inputs, needs, contiguous, strict=True)
    )


def _setup_context(ctx, inputs, output):
    *tensors, ctx.dtype, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_output, _):
    *inputs, top_k_index, first = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:4])
    grads = torch.ops.mhmoe.subtoken_experts_backward(grad_output, *inputs, first, top_k_index, ctx.dtype, needs)
    return *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), None, None, None


_experts.register_autograd(_backward, setup_context=_setup_context)


def experts(
    hidden_states: Tensor,
    first_proj: Tensor,
    down_proj: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate: SiluGate | ModuleGate,
    partial: bool,
) -> Tensor:
    """As `cpu.experts`; `partial` allows ids from E on."""
    inputs = (hidden_states, first_proj, down_proj, top_k_weights)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    dtype = cpu.product_dtype(first_proj)
    few = ROWS_16_BIT if dtype.itemsize == 2 else ROWS
    if not keep and top_k_index.numel() <= few * len(first_proj):
        return _few_rows(*inputs, top_k_index, gate, dtype, partial)
    if not isinstance(gate, SiluGate):
        return _uncompiled_experts(hidden_states, first_proj, down_proj, top_k_index, top_k_weights, gate)
    return _experts(*inputs, top_k_index, dtype, keep)[0]


_uncompiled_experts = torch.compiler.disable(cpu.experts)  # any function of a module's: the graph breaks here


def _few_rows(
    hidden_states: Tensor,
    first_proj: Tensor,
    down_proj: Tensor,
    top_k_weights: Tensor,
    top_k_index: Tensor,
    gate: SiluGate | ModuleGate,
    dtype: torch.dtype,
    partial: bool,
) -> Tensor:
    ids, top_k = top_k_index.flatten(), top_k_index.shape[1]
    here = ids < len(first_proj)
    if partial:
        ids = torch.where(here, ids, 0)
    rows = hidden_states.to(dtype)[:, None].expand(-1, top_k, -1).flatten(0, 1)
    inner = gate.of(_row_products(rows, first_proj, ids))
    output = _row_products(inner, down_proj, ids) * top_k_weights.to(dtype).reshape(-1, 1)
    if partial:
        output = torch.where(here[:, None], output, 0)
    return output.view(*top_k_index.shape, hidden_states.shape[1]).sum(dim=1).to(hidden_states.dtype)


def _row_products(rows: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Rows (n, a) times the matrices `ids` (n,) of `weights` (E, b, a): (n, b). Sums are in float32 at least."""
    exact = torch.promote_types(rows.dtype, torch.float32)
    products = weights[ids].to(rows.dtype).to(exact) * rows[:, None].to(exact)
    return products.sum(dim=-1).to(rows.dtype)
