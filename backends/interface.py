"""A backend of transformers' experts, for any MoE layer whose weights have the usual layout."""

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    _default_apply_gate,
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
)

from .activations import ModuleActivation, name_of, named
from .cpu import compiled, experts
from .problem import Problem, product_dtype


NAME = "subtoken"


def subtoken_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """
    The forward of modules that transformers' `use_experts_implementation` decorates: (S, d), (S, k), (S, k) -> (S, d).
    On other devices it is grouped_mm. Where tensors have no numbers, or torch.func transforms them, it is batched_mm,
    whose every step is an operator of torch's, and which copies the matrices of an expert for each of its rows.

    Raises:
        ValueError: the experts have biases, norms or other parameters that this backend does not know.
    """
    compiling = torch.compiler.is_compiling()
    if torch.compiler.is_exporting() or (not compiling and _is_followed(hidden_states)):
        return batched_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    if hidden_states.device.type != "cpu":
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    problem = _problem(self, hidden_states, top_k_index, top_k_weights)
    return (compiled if compiling else experts).experts(problem)


def _problem(
    module: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> Problem:
    activation = _activation(module)
    first_proj, down_proj = _weights(module, activation)
    return Problem(
        hidden_states,
        first_proj,
        down_proj,
        top_k_weights,
        top_k_index,
        activation,
        product_dtype(first_proj),
        # whether another process may have some of the experts; transformers before 5.18 does not say
        partial=getattr(module, "_is_expert_parallel", True),
    )


def _is_followed(hidden_states: torch.Tensor) -> bool:
    """Whether there are no numbers to go by, or operators are followed by more than autograd's way back."""
    return (
        hidden_states.device.type == "meta"
        or isinstance(hidden_states, FakeTensor)
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None  # vmap, grad and the like
        or forward_ad._current_level >= 0
    )


def _weights(module: Any, activation: ModuleActivation) -> tuple[torch.Tensor, torch.Tensor]:
    """(E, 2i or i, d) and (E, d, i): what the experts' weights effectively are."""
    first_name = "gate_up_proj" if module.has_gate else "up_proj"
    # a known activation, where that is the only module inside, has no parameters: to look costs each compiled call
    # forty guards
    alone = activation.name is not None and len(module._modules) == 1
    names = module._parameters if alone else dict(module.named_parameters())
    known = {first_name, "down_proj"}
    if not known >= names.keys():
        names = [name for name in names if _weight_made_of(name, module) not in known]
    unknown = [name for name in names if name not in known]
    if unknown or module.has_bias or getattr(module, "has_post_expert_norm", False):
        raise ValueError(
            f"experts_implementation={NAME!r} does not know {', '.join(unknown) or 'the norm'} of "
            f"{type(module).__name__}; choose grouped_mm."
        )
    weights: tuple[torch.Tensor, ...] = getattr(module, first_name), module.down_proj
    if not torch.compiler.is_compiling():
        # a tensor subclass that has a way of its own to be restored is torchao's
        own_way = (type(weight).dequantize is not torch.Tensor.dequantize for weight in weights)
        weights = tuple(weight.dequantize() if own else weight for weight, own in zip(weights, own_way, strict=True))
    first_proj, down_proj = (weight.transpose(1, 2) if module.is_transposed else weight for weight in weights)
    return first_proj, down_proj


def _weight_made_of(name: str, module: nn.Module) -> str:
    """
    The weight that torch.nn.utils makes of a parameter before it is used: parametrize (on which PEFT's adapters of
    parameters build), prune, weight_norm or spectral_norm. Any other parameter is used as it is.
    """
    if name.startswith("parametrizations."):
        return name.split(".")[1]
    weight, _, part = name.rpartition("_")
    return weight if part in ("orig", "g", "v") and weight not in module._parameters else name


def _activation(module: Any) -> ModuleActivation:
    name = name_of(module.act_fn)
    if not module.has_gate:
        return named(name, gated=False) if name else ModuleActivation(module.act_fn)
    usual = module.is_concatenated and _class_of(module)._apply_gate is _default_apply_gate
    return named(name, gated=True) if name and usual else ModuleActivation(module._apply_gate)


def _class_of(experts: Any) -> type[Any]:
    """Of a view with other weights, and nothing else changed, that of the experts it is a view of."""
    return type(experts) if hasattr(type(experts), "_apply_gate") else type(experts.experts)


def register() -> None:
    """Make the backend known to transformers under its name."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, subtoken_experts_forward)
