"""
All experts at once, with torch's grouped product, as in transformers' grouped_mm; unlike there, rows are summed in the
same order each time. The products of small experts in float32, and of a few rows where a processor reads the matrices
fast, take less time than what `experts.py` does for each expert.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..problem import Problem
from .choices import load, small, way
from .routing import Routing, combine, route, row_weights


grouped_mm: Any = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)  # the latter before torch 2.10
BYTES = 16  # that rows must be a multiple of, and until torch 2.10 the places where tensors begin


def suit(problem: Problem, with_gradients: bool) -> bool:
    """Whether this is the faster way, and torch has it for these tensors; it was measured without gradients."""
    first_proj, down_proj, dtype = problem.first_proj, problem.down_proj, problem.dtype
    # in 16 bits the library makes a program for each new shape, and here each expert has a shape of its own
    faster = dtype.itemsize > 2 and small(problem)
    measured = not with_gradients and way(dtype, load(problem)) == "at once"
    if not problem.top_k_index.numel() or not (faster or measured):
        return False
    if not _is_known(dtype) or torch._C._len_torch_dispatch_stack():
        return False
    lengths = (*first_proj.shape[1:], *down_proj.shape[1:])
    usual = all(1 in weights.stride()[1:] for weights in (first_proj, down_proj))
    return usual and all(length * dtype.itemsize % BYTES == 0 for length in lengths)


@cache
def _is_known(dtype: torch.dtype) -> bool:
    """Whether this version of torch has both products on CPU."""
    matrices = torch.zeros(2, 8, 8, dtype=dtype, device="cpu")
    ends = torch.tensor([8, 8], dtype=torch.int32, device="cpu")
    try:
        grouped_mm(matrices[0], matrices, offs=ends)
        return grouped_mm(matrices[0].t(), matrices[1], offs=ends).shape == matrices.shape
    except (RuntimeError, TypeError):
        return False


def _ready(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """In this dtype, at a place that torch takes: where a file is mapped into memory, tensors begin anywhere."""
    weights = weights.to(dtype)
    return weights if weights.data_ptr() % BYTES == 0 or _may_begin_anywhere(dtype) else weights.clone()


@cache
def _may_begin_anywhere(dtype: torch.dtype) -> bool:
    matrices = torch.zeros(65, dtype=dtype, device="cpu")[1:].view(1, 8, 8)
    try:
        grouped_mm(matrices[0].clone(), matrices, offs=torch.tensor([8], dtype=torch.int32, device="cpu"))
    except RuntimeError:
        return False
    return True


def sort(problem: Problem) -> Routing:
    """Without spare rows."""
    return route(problem.top_k_index, problem.num_experts, lambda loads: loads)


def forward(problem: Problem, routing: Routing) -> tuple[Tensor, Tensor]:
    """The output (S, d) and the first product (rows, 2i), in the dtype of the products."""
    dtype, ends = problem.dtype, _ends(problem, routing)
    rows = problem.hidden_states.to(dtype).index_select(0, routing.tokens)
    first = grouped_mm(rows, _ready(problem.first_proj, dtype).transpose(1, 2), offs=ends)
    inner = first.new_empty(len(first), problem.down_proj.shape[2])
    problem.activation.forward(first, inner)
    outputs = grouped_mm(inner, _ready(problem.down_proj, dtype).transpose(1, 2), offs=ends)
    outputs.mul_(row_weights(problem, routing))
    return combine(_padded(routing, outputs), routing.places), first


def backward(
    problem: Problem, routing: Routing, first: Tensor, grad_output: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """As `experts.backward`."""
    dtype, first_proj, down_proj = problem.dtype, problem.first_proj, problem.down_proj
    ends = _ends(problem, routing)
    needs_hidden, needs_first, needs_down, needs_weights, *_ = needs
    weights = row_weights(problem, routing)
    grads = grad_output.to(dtype).index_select(0, routing.tokens)
    grad = grouped_mm(grads, _ready(down_proj, dtype), offs=ends)
    output, inner = torch.empty_like(grad), torch.empty_like(grad)
    problem.activation.forward(first, output, inner)
    grad_tokens = grad_first_proj = grad_down_proj = grad_weights = None
    if needs_weights:
        grad_rows = _padded(routing, torch.linalg.vecdot(grad, output))
        grad_weights = grad_rows[routing.places].to(problem.top_k_weights.dtype)
    if needs_down:
        grad_down_proj = grouped_mm(grads.mul_(weights).t(), output, offs=ends).to(down_proj.dtype)
    if needs_first or needs_hidden:
        grad_first = torch.empty_like(first)
        problem.activation.backward(first, inner, grad.mul_(weights), grad_first)
        if needs_hidden:
            grad_hidden = _padded(routing, grouped_mm(grad_first, _ready(first_proj, dtype), offs=ends))
            grad_tokens = combine(grad_hidden, routing.places).to(problem.hidden_states.dtype)
        if needs_first:
            rows = problem.hidden_states.to(dtype).index_select(0, routing.tokens)
            grad_first_proj = grouped_mm(grad_first.t(), rows, offs=ends).to(first_proj.dtype)
    return grad_tokens, grad_first_proj, grad_down_proj, grad_weights


def _ends(problem: Problem, routing: Routing) -> Tensor:
    """Where each expert's rows end, `(E,)`."""
    loads = np.zeros(problem.num_experts, np.int32)
    loads[routing.experts] = routing.loads
    return torch.from_numpy(loads.cumsum(dtype=np.int32))


def _padded(routing: Routing, rows: Tensor) -> Tensor:
    """With one row more, of zeros, for what was sent to experts that are not here."""
    return torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])]) if routing.missing else rows
