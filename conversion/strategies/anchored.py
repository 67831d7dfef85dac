"""
Strategy `anchored`: d/2 neurons of each dense FFN move into the MH-MoE layer without loss; the others stay, as the
shared expert. The logits are the dense model's up to rounding, while head layer, experts and merge layer all compute
something from the first step on.

A SwiGLU neuron computes c * act(g.x) * (u.x) from gate row g, up row u and down column c. With g and u as rows of the
head layer its two inner numbers are two dimensions of a sub-token; an expert with an identity neuron multiplies them,
c as a column of the merge layer the neuron is whole again. A sub-token of d/h numbers so carries d/2h neurons:

- head layer, rows of head j: [G_q; U_q] for the d/2h neurons q of that head;
- every expert: its first d/2h neurons are the identity (gate row r takes dimension r, up row r takes d/2h + r, down
  writes dimension r), so it does not matter which experts the router picks, as long as their weights sum to one;
- merge layer, columns of head j: [D_q, random].

An expert's other neurons have random gate and up rows and a zero down projection: they add nothing at first, but their
down projection has a gradient at once, as have the second halves of the sub-tokens' outputs, which the identity leaves
zero, because the merge layer's columns for them are random.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedConfig

from mhmoe.errors import UserError

from ..sizes import Sizes
from .strategy import ConversionStrategy, Promise


if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..tensors import DenseFFN


@dataclass(frozen=True)
class Split:
    """
    Which neurons of a dense FFN go where.

    Attributes:
        moving: (h, d/2h), the neurons of each head.
        staying: those of the shared expert, in ascending order.
    """

    moving: torch.Tensor
    staying: torch.Tensor


class Anchored(ConversionStrategy):
    """
    d/2 dense neurons per layer in head layer, experts and merge layer, the others in the shared expert.

    Which neurons go is free, for all are exact. They are taken evenly over the ranking by |g| |u| |c|, the size of
    what a neuron adds to a token of any direction, and dealt to the heads in turn: experts and shared expert then have
    like shares of the FFN, and heads weigh alike. Taking the strongest instead gathers the few neurons with huge
    activations in the experts, where rounding costs more: on SmolLM2-135M and 1,536 tokens of WikiText-2 the logits
    then moved by up to 2.2e-4, against 0.8e-4.
    """

    name = "anchored"
    summary = "part of the dense neurons inside the experts, the others shared; logits equal up to rounding"
    promise = Promise(
        in_short="logits are equal up to rounding (float32: 2e-4), greedy text is equal",
        text="in float32 the logits are the dense model's up to rounding (at most 2e-4 apart), and so is greedy text. "
        "hidden_size / 2 neurons of each dense FFN are rows of the head layer, identity neurons of every expert and "
        "columns of the merge layer; the others are the shared expert. In bfloat16 "
        "rounding moves the logits as much as it moves the dense model's own; perplexity stays within 2%.",
        max_logit_difference=2e-4,
        max_perplexity_ratio=1.02,
    )
    untrained = (
        "It says what the dense model says, with dense neurons at work in the experts; the experts differ only in "
        "neurons that add nothing yet, and routing makes no difference before training."
    )
    needs_gates = True
    made_from = {
        "head_layer.weight": "gate_proj.weight",
        "merge_layer.weight": "down_proj.weight",
        **{f"shared_expert.{name}_proj.weight": f"{name}_proj.weight" for name in ("gate", "up", "down")},
    }

    family = ("private_experts", "router_input")

    @classmethod
    def shared_width(cls, dense_config: PreTrainedConfig, sizes: Sizes) -> int:
        return cls.needs_width(max(dense_config.intermediate_size - dense_config.hidden_size // 2, 0), sizes)

    @classmethod
    def check(cls, recipe: "Recipe") -> None:
        config = recipe.config
        d, heads = config.hidden_size, config.num_moe_heads
        if heads == 1:
            raise UserError(f"--num-moe-heads 1 has no head layer, which strategy {cls.name} needs; give 2 or more")
        if d % (2 * heads):
            raise UserError(
                f"--num-moe-heads {heads} makes sub-tokens of {d // heads} numbers, and strategy {cls.name} needs an "
                f"even number; choose heads so that twice as many divide hidden_size={d}"
            )
        if config.moe_intermediate_size < d // (2 * heads):
            raise UserError(
                f"--moe-intermediate-size {config.moe_intermediate_size} is too small for strategy {cls.name}, which "
                f"puts {d // (2 * heads)} dense neurons into every expert; give at least {d // (2 * heads)}"
            )
        if not config.norm_topk_prob:
            raise UserError(
                f"--no-norm-topk-prob: strategy {cls.name} needs expert weights that sum to one; leave it out"
            )
        if config.mlp_bias:
            raise UserError(
                f"mlp_bias=True: strategy {cls.name} has no place for the biases of dense neurons, as head and merge "
                "layer have none; choose --strategy exact"
            )
        if config.intermediate_size < d // 2:
            raise UserError(
                f"intermediate_size={config.intermediate_size} is less than the {d // 2} dense neurons that "
                f"strategy {cls.name} moves; choose --strategy exact"
            )

    def layer(self, layer: int, ffn: "DenseFFN") -> Iterator[tuple[str, torch.Tensor]]:
        return self.anchored(layer, ffn, self._split(ffn))

    def anchored(
        self,
        layer: int,
        ffn: Mapping[str, torch.Tensor],
        split: Split,
        inputs: Iterable[torch.Tensor] | None = None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """
        The tensors of a layer, in the model's order.

        Args:
            layer: which one.
            ffn: the weights of the dense FFN.
            split: which of its neurons go where.
            inputs: what the router is to see of the text, see [`ConversionStrategy.router`].
        """
        yield "head_layer.weight", self._head_layer(ffn, split)
        yield "merge_layer.weight", self._merge_layer(layer, ffn, split)
        yield "gate.weight", self.router(layer, lambda: self._head_layer(ffn, split), inputs)
        yield "experts.gate_up_proj", self._experts_in(layer)
        yield "experts.down_proj", self._experts_out()
        if len(split.staying):
            yield "shared_expert.gate_proj.weight", ffn["gate_proj.weight"][split.staying]
            yield "shared_expert.up_proj.weight", ffn["up_proj.weight"][split.staying]
            yield "shared_expert.down_proj.weight", ffn["down_proj.weight"][:, split.staying]

    def _split(self, ffn: Mapping[str, torch.Tensor]) -> Split:
        parts = ((ffn[f"{name}_proj.weight"], name) for name in ("gate", "up", "down"))
        norms = [weight.double().norm(dim=0 if name == "down" else 1) for weight, name in parts]
        strength = torch.stack(norms).prod(dim=0)
        moved = self.config.hidden_size // 2
        ranks = (2 * torch.arange(moved) + 1) * len(strength) // (2 * moved)
        moving = strength.argsort(descending=True, stable=True)[ranks]
        staying = torch.ones(len(strength), dtype=torch.bool)
        staying[moving] = False
        return Split(self.dealt(moving), staying.nonzero()[:, 0])

    def dealt(self, neurons: torch.Tensor) -> torch.Tensor:
        """d/2 neurons, dealt to the heads in turn: (h, d/2h)."""
        return neurons.view(-1, self.config.num_moe_heads).T

    def _head_layer(self, ffn: Mapping[str, torch.Tensor], split: Split) -> torch.Tensor:
        gate, up = (ffn[f"{name}_proj.weight"][split.moving] for name in ("gate", "up"))
        return torch.cat([gate, up], dim=1).view(self.shapes["head_layer.weight"])  # 2 x (h, d/2h, d) -> (d, d)

    def _merge_layer(self, layer: int, ffn: Mapping[str, torch.Tensor], split: Split) -> torch.Tensor:
        down = ffn["down_proj.weight"]
        weight = self.fresh(layer, "merge_layer.weight").to(down.dtype)
        by_head = weight.view(len(weight), len(split.moving), 2, -1)  # (d, d) -> (d, h, 2, d/2h)
        by_head[:, :, 0] = down[:, split.moving]
        return weight

    def _experts_in(self, layer: int) -> torch.Tensor:
        """(E, 2i, d/h): identity neurons, then random ones."""
        weight = self.fresh(layer, "experts.gate_up_proj")
        neurons = weight.shape[2] // 2
        for projection, first in zip(weight.chunk(2, dim=1), (0, neurons), strict=True):  # gate, up
            projection[:, :neurons] = 0
            projection[:, :neurons, first : first + neurons] = torch.eye(neurons)
        return weight

    def _experts_out(self) -> torch.Tensor:
        """(E, d/h, i): the identity neurons' outputs go to the first half, the random ones' nowhere yet."""
        weight = torch.zeros(self.shapes["experts.down_proj"])
        neurons = weight.shape[1] // 2
        weight[:, :neurons, :neurons] = torch.eye(neurons)
        return weight
