"""The activation of an expert, between its two products: row by row, on buffers of the thread that calls it."""

from collections.abc import Callable

import torch
from torch import Tensor


class SwiGLU:
    """silu(gate) * up, of a first product (n, 2i) that holds n rows of gates, then ups."""

    def of(self, first: Tensor) -> Tensor:
        """The output (n, i), in a graph of torch.compile."""
        gate, up = first.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    def forward(self, first: Tensor, output: Tensor, inner: Tensor | None = None) -> None:
        """Fill `output` (n, i), and for the backward pass `inner` (n, i)."""
        gate, up = first.chunk(2, dim=-1)
        inner = output if inner is None else inner
        torch.ops.aten.silu.out(gate, out=inner)
        torch.mul(inner, up, out=output)

    def backward(self, first: Tensor, inner: Tensor, grad: Tensor, grad_first: Tensor) -> None:
        """Fill `grad_first` (n, 2i) from the gradient of the output, which is lost."""
        gate, up = first.chunk(2, dim=-1)
        grad_gate, grad_up = grad_first.chunk(2, dim=-1)
        torch.mul(grad, inner, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=grad_gate)


class ModuleActivation:
    """Any other function of the rows, differentiated by autograd."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        self.of = function

    def forward(self, first: Tensor, output: Tensor, inner: Tensor | None = None) -> None:
        output.copy_(self.of(first))

    def backward(self, first: Tensor, inner: Tensor, grad: Tensor, grad_first: Tensor) -> None:
        with torch.enable_grad():
            first = first.detach().requires_grad_()
            grad_first.copy_(torch.autograd.grad(self.of(first), first, grad)[0])
