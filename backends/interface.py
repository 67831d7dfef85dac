"""The backend "subtoken" of transformers' experts, for any MoE layer whose weights have the usual layout."""

import torch
from torch import nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate, grouped_mm_experts_forward

from . import compiled, cpu
from .gates import ModuleGate, SiluGate


NAME = "subtoken"


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
    first_name = "gate_up_proj" if self.has_gate else "up_proj"
    known = {first_name, "down_proj"}
    unknown = sorted(name for name, _ in self.named_parameters() if name not in known)
    if unknown or self.has_bias or self.has_post_expert_norm:
        raise ValueError(
            f"experts_implementation={NAME!r} does not know {', '.join(unknown) or 'the norm'} of "
            f"{type(self).__name__}; choose grouped_mm."
        )
    first_proj, down_proj = getattr(self, first_name), self.down_proj
    if self.is_transposed:
        first_proj, down_proj = first_proj.transpose(1, 2), down_proj.transpose(1, 2)
    inputs = (hidden_states, first_proj, down_proj, top_k_index, top_k_weights)
    gate = _gate(self)
    if not torch.compiler.is_compiling():
        return cpu.experts(*inputs, gate)
    if isinstance(gate, SiluGate):
        return compiled.experts(*inputs)
    return _uncompiled_experts(*inputs, gate)


_uncompiled_experts = torch.compiler.disable(cpu.experts)  # any function of a module's: the graph breaks here


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
    """Make the backend known to transformers under its name."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, subtoken_experts_forward)
