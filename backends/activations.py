"""The activation of an expert, between its two products: row by row, on buffers of the thread that calls it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu, silu
from transformers.activations import ACT2FN


def quick_gelu(rows: Tensor) -> Tensor:
    return rows * torch.sigmoid(1.702 * rows)


def relu_squared(rows: Tensor) -> Tensor:
    return relu(rows).square()


aten = torch.ops.aten
# by transformers' names, in the order of kernel/lanes.h; what other names mean is the same but for its last bits
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "quick_gelu": quick_gelu,
    "gelu_pytorch_tanh": partial(gelu, approximate="tanh"),
    "gelu": gelu,
    "relu": relu,
    "relu2": relu_squared,
}
OTHER_NAMES = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}
NAMES = {type(ACT2FN[name]): name for name in FUNCTIONS} | {
    type(ACT2FN[other]): name for other, name in OTHER_NAMES.items()
}


def quick_gelu_out(rows: Tensor, out: Tensor) -> None:
    torch.mul(rows, 1.702, out=out).sigmoid_().mul_(rows)


def quick_gelu_backward(grad: Tensor, rows: Tensor, grad_input: Tensor) -> None:
    part = torch.sigmoid(1.702 * rows)
    torch.mul(grad, part * (1 + 1.702 * rows * (1 - part)), out=grad_input)


def relu_squared_out(rows: Tensor, out: Tensor) -> None:
    torch.clamp_min(rows, 0, out=out).square_()


def relu_squared_backward(grad: Tensor, rows: Tensor, grad_input: Tensor) -> None:
    torch.mul(grad, 2 * relu(rows), out=grad_input)


# of each: what fills in the output, and what the gradient
OPERATORS: dict[str, tuple[Callable, Callable]] = {
    "silu": (aten.silu.out, aten.silu_backward.grad_input),
    "quick_gelu": (quick_gelu_out, quick_gelu_backward),
    "gelu_pytorch_tanh": (
        partial(aten.gelu.out, approximate="tanh"),
        partial(aten.gelu_backward.grad_input, approximate="tanh"),
    ),
    "gelu": (aten.gelu.out, aten.gelu_backward.grad_input),
    "relu": (aten.relu.out, partial(aten.threshold_backward.grad_input, threshold=0)),
    "relu2": (relu_squared_out, relu_squared_backward),
}


def name_of(function: Any) -> str | None:
    """That of an activation module in `FUNCTIONS`; `None` of any other, and where hooks want to see it."""
    if type(function) is nn.GELU:
        name = "gelu" if function.approximate == "none" else "gelu_pytorch_tanh"
    else:
        name = NAMES.get(type(function))
    if name is None or torch.compiler.is_compiling():  # each look at hooks would be a guard of its call
        return name
    return None if function._forward_hooks or function._forward_pre_hooks else name


def named(name: str, gated: bool) -> "ModuleActivation":
    """One of `FUNCTIONS`, of the first product, or of the gates and then times the ups."""
    function = FUNCTIONS[name]
    return GatedActivation(partial(times_up, function), name) if gated else OperatorActivation(function, name)


def times_up(function: Callable[[Tensor], Tensor], first: Tensor) -> Tensor:
    gate, up = first.chunk(2, dim=-1)
    return function(gate) * up


class ModuleActivation:
    """
    Any function of the rows, differentiated by autograd.

    Args:
        function: of the first product, (n, 2i) or (n, i), to (n, i).
        name: in `FUNCTIONS`, of what is done with the first product or, where there are gates, with these; `None`
            where that is no such function.

    Attributes:
        gated: whether what has a name is done with gates, before these meet the ups.
    """

    gated = False

    def __init__(self, function: Callable[[Tensor], Tensor], name: str | None = None):
        self.of, self.name = function, name

    def forward(self, first: Tensor, output: Tensor, inner: Tensor | None = None) -> None:
        """Fill `output` (n, i), and for the backward pass, where it helps, `inner` (n, i)."""
        output.copy_(self.of(first))

    def backward(self, first: Tensor, inner: Tensor, grad: Tensor, grad_first: Tensor) -> None:
        """Fill `grad_first` (n, 2i) or (n, i) from the gradient of the output, which is lost."""
        with torch.enable_grad():
            first = first.detach().requires_grad_()
            grad_first.copy_(torch.autograd.grad(self.of(first), first, grad)[0])


class OperatorActivation(ModuleActivation):
    """One of `FUNCTIONS`, of the first product (n, i): without autograd, which an operator of torch's cannot use."""

    name: str

    def forward(self, first: Tensor, output: Tensor, inner: Tensor | None = None) -> None:
        OPERATORS[self.name][0](first, out=output)

    def backward(self, first: Tensor, inner: Tensor, grad: Tensor, grad_first: Tensor) -> None:
        OPERATORS[self.name][1](grad, first, grad_input=grad_first)


class GatedActivation(OperatorActivation):
    """One of `FUNCTIONS`, of the gates, times the ups, of a first product (n, 2i)."""

    gated = True

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
