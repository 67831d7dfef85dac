"""The CPU experts as one operator, which torch.compile takes into its graph whole."""

import torch
from torch import Tensor

from . import cpu
from .gates import SiluGate
from .routing import route, spare_rows


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
    hidden_states: Tensor, first_proj: Tensor, down_proj: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """As `cpu.experts` with a `SiluGate`."""
    inputs = (hidden_states, first_proj, down_proj, top_k_weights)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    return _experts(*inputs, top_k_index, cpu.product_dtype(first_proj), keep)[0]
