"""
The CPU experts in a graph of torch.compile: as one operator, or for a few rows without gradients as plain arithmetic,
of which its compiler makes one loop that reads the experts where they lie.
"""

import torch
from torch import Tensor

from ..activations import named
from ..problem import Problem
from . import experts as cpu
from . import native
from .choices import native_pays
from .routing import by_steps, route, spare_rows
from .tuning import COMPILED_ROWS, COMPILED_ROWS_16_BIT


@torch.library.custom_op("mhmoe::subtoken_experts", mutates_args=())
def _experts(
    hidden_states: Tensor,
    first_proj: Tensor,
    down_proj: Tensor,
    top_k_weights: Tensor,
    top_k_index: Tensor,
    dtype: torch.dtype,
    activation: str,
    gated: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """With what the backward pass needs: the first product, unless that was made in C, and whether it was."""
    tensors = hidden_states, first_proj, down_proj, top_k_weights, top_k_index
    problem = Problem(*tensors, named(activation, gated), dtype)
    # one size for all routings, since a graph's shapes do not depend on numbers
    first, in_c = _kept(top_k_index, first_proj, dtype, keep), top_k_index.new_zeros((), dtype=torch.bool)
    if not keep:
        output = cpu.inference(problem)
    elif native_pays(problem, with_gradients=True) and native.can(problem):
        output = native.forward(problem)
        in_c.fill_(True)
    else:
        output = cpu.forward(problem, route(top_k_index, len(first_proj), by_steps(dtype)), first)
    return output.to(hidden_states.dtype), first, in_c


@_experts.register_fake
def _(hidden_states, first_proj, down_proj, top_k_weights, top_k_index, dtype, activation, gated, keep):
    first, in_c = _kept(top_k_index, first_proj, dtype, keep), top_k_index.new_empty((), dtype=torch.bool)
    return torch.empty_like(hidden_states).contiguous(), first, in_c


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
    top_k_index: Tensor,
    first: Tensor,
    in_c: Tensor,
    dtype: torch.dtype,
    activation: str,
    gated: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = hidden_states, first_proj, down_proj, top_k_weights, top_k_index
    problem = Problem(*tensors, named(activation, gated), dtype)
    if in_c:
        grads = native.backward(problem, grad_output, needs)
    else:
        grads = cpu.backward(problem, route(top_k_index, len(first_proj), by_steps(dtype)), first, grad_output, needs)
    # an operator returns tensors; what is not needed is an empty one
    hidden, first, down, weights = (grad_output.new_empty(0) if grad is None else grad for grad in grads)
    return hidden, first, down, weights


@_experts_backward.register_fake
def _(grad_output, hidden_states, first_proj, down_proj, top_k_weights, *others):
    inputs, needs = (hidden_states, first_proj, down_proj, top_k_weights), others[-1]
    contiguous = (True, False, False, True)
    return tuple(
        (torch.empty_like(tensor).contiguous() if whole else torch.empty_like(tensor))
        if needed
        else grad_output.new_empty(0)
        for tensor, needed, whole in zip(inputs, needs, contiguous, strict=True)
    )


def _setup_context(ctx, inputs, output):
    *tensors, dtype, activation, gated, _ = inputs
    _, *kept = output
    ctx.save_for_backward(*tensors, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.others = dtype, activation, gated


def _backward(ctx, grad_output, *_):
    needs = list(ctx.needs_input_grad[:4])
    grads = torch.ops.mhmoe.subtoken_experts_backward(grad_output, *ctx.saved_tensors, *ctx.others, needs)
    return *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), *[None] * 5


_experts.register_autograd(_backward, setup_context=_setup_context)


def experts(problem: Problem) -> Tensor:
    """As `cpu.experts`, in a graph."""
    keep = problem.needs_gradients
    few = COMPILED_ROWS_16_BIT if problem.dtype.itemsize == 2 else COMPILED_ROWS
    if not keep and problem.top_k_index.numel() <= few * problem.num_experts:
        return _few_rows(problem)
    activation = problem.activation
    if activation.name is None:
        return _uncompiled_experts(problem)
    options = problem.dtype, activation.name, activation.gated, keep
    return _experts(*problem.differentiable, problem.top_k_index, *options)[0]


_uncompiled_experts = torch.compiler.disable(cpu.experts)  # any function of a module's: the graph breaks here


def _few_rows(problem: Problem) -> Tensor:
    hidden_states, dtype = problem.hidden_states, problem.dtype
    ids, top_k = problem.top_k_index.flatten(), problem.top_k_index.shape[1]
    here = ids < problem.num_experts
    if problem.partial:
        ids = torch.where(here, ids, 0)
    rows = hidden_states.to(dtype)[:, None].expand(-1, top_k, -1).flatten(0, 1)
    inner = problem.activation.of(_row_products(rows, problem.first_proj, ids))
    output = _row_products(inner, problem.down_proj, ids) * problem.top_k_weights.to(dtype).reshape(-1, 1)
    if problem.partial:
        output = torch.where(here[:, None], output, 0)
    return output.view(-1, top_k, hidden_states.shape[1]).sum(dim=1).to(hidden_states.dtype)


def _row_products(rows: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Rows (n, a) times the matrices `ids` (n,) of `weights` (E, b, a): (n, b). Sums are in float32 at least."""
    exact = torch.promote_types(rows.dtype, torch.float32)
    products = weights[ids].to(rows.dtype).to(exact) * rows[:, None].to(exact)
    return products.sum(dim=-1).to(rows.dtype)
