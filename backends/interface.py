"""Backends of transformers' experts, for any MoE layer whose weights have the usual layout."""

import torch
from torch import nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate, grouped_mm_experts_forward

from . import compiled, cpu
from .gates import ModuleGate, SiluGate


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
    gate = _gate(self)
    first_proj, down_proj = _weights(self, gate, NAME)
    inputs = (hidden_states, first_proj, down_proj, top_k_index, top_k_weights, gate)
    if torch.compiler.is_compiling():
        return compiled.experts(*inputs, partial=self._is_expert_parallel)
    return cpu.experts(*inputs)


def triton_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """
    The same in Triton, for SwiGLU experts on a GPU (and in Triton's interpreter).

    Raises:
        ValueError: Triton is not installed, or the experts are of another kind.
    """
    gate = _gate(self)
    first_proj, down_proj = _weights(self, gate, TRITON_NAME)
    if not isinstance(gate, SiluGate):
        raise ValueError(
            f"experts_implementation={TRITON_NAME!r} knows SwiGLU alone, not {type(self).__name__}; choose grouped_mm."
        )
    try:
        from . import gpu
    except ModuleNotFoundError as error:
        raise ValueError(
            f"experts_implementation={TRITON_NAME!r} needs {error.name}: install it, or choose grouped_mm."
        ) from error
    inputs = (hidden_states, first_proj, down_proj, top_k_index, top_k_weights)
    return gpu.experts(*inputs, partial=self._is_expert_parallel)


def _weights(experts: nn.Module, gate: SiluGate | ModuleGate, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(E, 2i or i, d) and (E, d, i)."""
    first_name = "gate_up_proj" if experts.has_gate else "up_proj"
    # a SiLU, where that is the only module inside, has no parameters: to look costs each compiled call forty guards
    alone = isinstance(gate, SiluGate) and len(experts._modules) == 1
    names = experts._parameters if alone else dict(experts.named_parameters())
    unknown = [name for name in names if name not in (first_name, "down_proj")]
    if unknown or experts.has_bias or experts.has_post_expert_norm:
        raise ValueError(
            f"experts_implementation={backend!r} does not know {', '.join(unknown) or 'the norm'} of "
            f"{type(experts).__name__}; choose grouped_mm."
        )
    weights = getattr(experts, first_name), experts.down_proj
    return tuple(weight.transpose(1, 2) for weight in weights) if experts.is_transposed else weights


def _gate(experts: nn.Module) -> SiluGate | ModuleGate:
    if not experts.has_gate:
        return ModuleGate(experts.act_fn)
    if (
        experts.is_concatenated
        and type(experts)._apply_gate is _default_apply_gate
        and isinstance(experts.act_fn, (nn.SiLU, SiLUActivation))
    ):
        return SiluGate()
    return ModuleGate(experts._apply_gate)


def register() -> None:
    """Make the backends known to transformers under their names."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, subtoken_experts_forward)
    ALL_EXPERTS_FUNCTIONS.register(TRITON_NAME, triton_experts_forward)
