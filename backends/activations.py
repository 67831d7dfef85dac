"""The activation of an expert, between its two products: row by row, on buffers of the thread that calls it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN


aten = torch.ops.aten
# transformers' names of functions that are computed in C too (cpu/native.py), under the first
KNOWN = (
    ("silu", "swish"),
    ("quick_gelu",),
    ("gelu_pytorch_tanh", "gelu_new", "gelu_fast"),
    ("gelu",),
    ("relu",),
    ("relu2",),
)
NAMES = {type(ACT2FN[name]): names[0] for names in KNOWN for name in names}
# what torch has operators for: one fills in the output, one the gradient; arguments of both, and of the second alone
OPERATORS: dict[str, tuple[Callable, Callable, dict[str, Any], dict[str, Any]]] = {
    "silu": (aten.silu.out, aten.silu_backward.grad_input, {}, {}),
    "gelu_pytorch_tanh": (aten.gelu.out, aten.gelu_backward.grad_input, {"approximate": "tanh"}, {}),
    "gelu": (aten.gelu.out, aten.gelu_backward.grad_input, {"approximate": "none"}, {}),
    "relu": (aten.relu.out, aten.threshold_backward.grad_input, {}, {"threshold": 0}),
}


def name_of(function: Any) -> str | None:
    """The first of the `KNOWN` names of an activation module; `None` of any other, and where hooks want to see it."""
    if type(function) is nn.GELU:
        name = "gelu" if function.approximate == "none" else "gelu_pytorch_tanh"
    else:
        name = NAMES.get(type(function))
    if name is None or torch.compiler.is_compiling():  # each look at hooks would be a guard of its call
        return name
    return None if function._forward_hooks or function._forward_pre_hooks else name


class ModuleActivation:
    """
    Any function of the rows, differentiated by autograd.

    Args:
        function: of the first product, (n, 2i) or (n, i), to (n, i).
        name: of an activation that is known by it, of the first product or, where that is `gated`, of the gates that
            stand before the ups.
        gated: whether it is.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], name: str | None = None, gated: bool = False):
        self.of, self.name, self.gated = function, name, gated

    def forward(self, first: Tensor, output: Tensor, inner: Tensor | None = None) -> None:
        """Fill `output` (n, i), and for the backward pass, where it helps, `inner` (n, i)."""
        output.copy_(self.of(first))

    def backward(self, first: Tensor, inner: Tensor, grad: Tensor, grad_first: Tensor) -> None:
        """Fill `grad_first` (n, 2i) or (n, i) from the gradient of the output, which is lost."""
        with torch.enable_grad():
            first = first.detach().requires_grad_()
            grad_first.copy_(torch.autograd.grad(self.of(first), first, grad)[0])


class OperatorActivation(ModuleActivation):
    """One of `OPERATORS`, of the first product (n, i)."""

    name: str

    def forward(self, first: Tensor, output: Tensor, inner: Tensor | None = None) -> None:
        operator, _, options, _ = OPERATORS[self.name]
        operator(first, out=output, **options)

    def backward(self, first: Tensor, inner: Tensor, grad: Tensor, grad_first: Tensor) -> None:
        _, derivative, options, more = OPERATORS[self.name]
        derivative(grad, first, grad_input=grad_first, **options, **more)


class GatedActivation(OperatorActivation):
    """One of `OPERATORS`, of the gates, times the ups, of a first product (n, 2i)."""

    def forward(self, first: Tensor, output: Tensor, inner: Tensor | None = None) -> None:
        gate, up = first.chunk(2, dim=-1)
        inner = output if inner is None else inner
        super().forward(gate, inner)
        torch.mul(inner, up, out=output)

    def backward(self, first: Tensor, inner: Tensor, grad: Tensor, grad_first: Tensor) -> None:
        gate, up = first.chunk(2, dim=-1)
        grad_gate, grad_up = grad_first.chunk(2, dim=-1)
        torch.mul(grad, inner, out=grad_up)
        super().backward(gate, inner, grad.mul_(up), grad_gate)


class SwiGLU(GatedActivation):
    """silu(gate) * up: P2's, and the one that torch.compile can take whole (cpu/compiled.py)."""

    def __init__(self):
        super().__init__(swiglu, "silu", gated=True)


def swiglu(first: Tensor) -> Tensor:
    gate, up = first.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
