"""
MH-MoE in vLLM: the package's own model in vLLM's Transformers backend, which puts vLLM's attention, linear layers and
norms in the place of transformers'. This states the difference from other MoE models: an expert has d/h numbers.

Shapes: d hidden size, h MoE heads, S sub-tokens of d/h numbers, k experts per sub-token.
"""

import torch
from torch import nn
from torch.nn.functional import pad
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.models.transformers import TransformersMoEForCausalLM
from vllm.model_executor.models.transformers.base import Base
from vllm.model_executor.models.transformers.moe import (
    TransformersMoERunner,
    TransformersMoEState,
    TransformersRoutedExperts,
)
from vllm.platforms import current_platform

from mhmoe.modeling_mhmoe.experts import MHMoEExperts, SubTokenExperts
from mhmoe.modeling_mhmoe.layer import experts_implementation


# what vLLM calls the activations that its fused experts have on every platform
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
CPU_ALIGNMENT = 32  # of the numbers of a sub-token, in vLLM's fused experts for CPUs


class SubTokenRunner(TransformersMoERunner):
    """vLLM's fused experts, whose routing is the model's own."""

    def forward(
        self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, **kwargs
    ) -> torch.Tensor:
        """(S, d/h), (S, k), (S, k) -> (S, d/h)."""
        width = hidden_states.shape[-1]
        # a copy even where it adds nothing: the experts may write to what they are given
        padded = pad(hidden_states, (0, self.moe_config.hidden_dim - width))
        return super().forward(padded, topk_ids, topk_weights)[:, :width].contiguous()


class MHMoEForCausalLM(TransformersMoEForCausalLM):
    """
    Every `MHMoEForCausalLM` that [`ServedConfig`][mhmoe.serving.served.ServedConfig] lets through. Experts of another
    kind than gated, or with another activation than `ACTIVATIONS`, stay the package's own, whole in each process.
    """

    def _patch_config(self) -> None:
        super()._patch_config()
        self.config.served_by_mhmoe = True  # without which the model refuses vLLM

    def recursive_replace(self) -> None:
        self.moe_layers, self.mlp_layers = [], []  # vLLM's names of fused experts, and of the blocks around them
        for name, block in self.model.named_modules():
            experts = getattr(block, "experts", None)
            # a subclass may compute something else
            if type(experts) is MHMoEExperts and self.config.hidden_act in ACTIVATIONS:
                block.experts = self._fused(experts, prefix=f"model.{name}.experts")
                self.moe_layers.append(block.experts)
                self.mlp_layers.append(block)
            elif isinstance(experts, SubTokenExperts) and not self.model_config.enforce_eager:
                experts.config._experts_implementation = self._compilable()
        self.num_moe_layers = len(self.moe_layers)
        Base.recursive_replace(self)  # not that of vLLM's other MoE models, whose experts have all d numbers

    def _compilable(self) -> str:
        """A backend whose graph has no break, as vLLM wants it; "grouped_mm" where it does for the sizes."""
        chosen = experts_implementation("grouped_mm", [self.config], self.model_config.dtype)
        return "batched_mm" if chosen == "eager" else "grouped_mm"

    def _fused(self, experts: MHMoEExperts, prefix: str) -> SubTokenRunner:
        state = TransformersMoEState()
        alignment = CPU_ALIGNMENT if current_platform.is_cpu() else 1
        fused = FusedMoEFactory(
            num_experts=experts.num_experts,
            top_k=self.config.num_experts_per_tok,
            hidden_size=-(-experts.hidden_dim // alignment) * alignment,
            intermediate_size=experts.intermediate_dim,
            prefix=prefix,
            activation=ACTIVATIONS[self.config.hidden_act],
            # the runner gives the weights in place of logits, and leaves the indices in `state`
            custom_routing_function=lambda hidden_states, gating_output, topk, renormalize: (
                gating_output,
                state.topk_ids,
            ),
            runner_cls=SubTokenRunner,
            runner_args={"moe_state": state},
            routed_experts_cls=TransformersRoutedExperts,
        )
        for weight in fused.parameters():  # loading fills what is not padding
            nn.init.zeros_(weight)
        return fused
