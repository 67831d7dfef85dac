"""Gradients that cannot be differentiated again, and say so."""

from collections.abc import Iterable

import torch
from torch import Tensor


def refuse_second(gradients: Iterable[Tensor | None], *causes: Tensor) -> tuple[Tensor | None, ...]:
    """The `gradients`; under create_graph=True as tensors that depend on their `causes`, and refuse to be followed."""
    if not torch.is_grad_enabled():
        return tuple(gradients)
    return tuple(None if gradient is None else _NoSecond.apply(gradient, *causes) for gradient in gradients)


class _NoSecond(torch.autograd.Function):
    """The first tensor; torch's `once_differentiable` overlooks causes that a function saved."""

    @staticmethod
    def forward(ctx, gradient, *causes):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, grad_output):  # ty: ignore[incompatible-method-override]: torch's stub takes any number
        raise RuntimeError("these experts have no second derivatives; choose experts_implementation='grouped_mm'.")
