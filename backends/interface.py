"""Backends of transformers' experts, for any MoE layer whose weights have the usual layout."""

import torch
from torch import nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate, grouped_mm_experts_forward

from .cpu import compiled, experts
from .gates import ModuleGate, SwiGLU
from .problem import Problem, product_dtype


NAME, TRITON_NAME = "subtoken", "subtoken_triton"


def subtoken_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """
    The forward of modules that transformers' `use_experts_implementation` decorates: (S, d), (S, k), (S, k) -> (S, d).

    Raises:
        ValueError: the experts have biases, norms or other parameters that this backend does not know.
    """
    if hidden_states.device.type != "cpu" or torch.compiler.is_exporting():
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    problem = _problem(self, hidden_states, top_k_index, top_k_weights, NAME)
    return (compiled if torch.compiler.is_compiling() else experts).experts(problem)


def triton_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """
    The same in Triton, for SwiGLU experts on a GPU (and in Triton's interpreter).

    Raises:
        ValueError: Triton is not installed, or the experts are of another kind.
    """
    problem = _problem(self, hidden_states, top_k_index, top_k_weights, TRITON_NAME)
    if not isinstance(problem.gate, SwiGLU):
        raise ValueError(
            f"experts_implementation={TRITON_NAME!r} knows SwiGLU alone, not {type(self).__name__}; choose grouped_mm."
        )
    try:
        from .triton import experts as triton_experts
    except ModuleNotFoundError as error:
        raise ValueError(
            f"experts_implementation={TRITON_NAME!r} needs {error.name}: install it, or choose grouped_mm."
        ) from error
    return triton_experts.experts(problem)


def _problem(
    module: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    backend: str,
) -> Problem:
    gate = _gate(module)
    first_proj, down_proj = _weights(module, gate, backend)
    return Problem(
        hidden_states,
        first_proj,
        down_proj,
        top_k_weights,
        top_k_index,
        gate,
        product_dtype(first_proj),
        module._is_expert_parallel,
    )


def _weights(module: nn.Module, gate: SwiGLU | ModuleGate, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(E, 2i or i, d) and (E, d, i)."""
    first_name = "gate_up_proj" if module.has_gate else "up_proj"
    # a SiLU, where that is the only module inside, has no parameters: to look costs each compiled call forty guards
    alone = isinstance(gate, SwiGLU) and len(module._modules) == 1
    names = module._parameters if alone else dict(module.named_parameters())
    unknown = [name for name in names if name not in (first_name, "down_proj")]
    if unknown or module.has_bias or module.has_post_expert_norm:
        raise ValueError(
            f"experts_implementation={backend!r} does not know {', '.join(unknown) or 'the norm'} of "
            f"{type(module).__name__}; choose grouped_mm."
        )
    weights = getattr(module, first_name), module.down_proj
    return tuple(weight.transpose(1, 2) for weight in weights) if module.is_transposed else weights


def _gate(module: nn.Module) -> SwiGLU | ModuleGate:
    if not module.has_gate:
        return ModuleGate(module.act_fn)
    if (
        module.is_concatenated
        and type(module)._apply_gate is _default_apply_gate
        and isinstance(module.act_fn, (nn.SiLU, SiLUActivation))
    ):
        return SwiGLU()
    return ModuleGate(module._apply_gate)


def register() -> None:
    """Make the backends known to transformers under their names."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, subtoken_experts_forward)
    ALL_EXPERTS_FUNCTIONS.register(TRITON_NAME, triton_experts_forward)
