"""
Strategy `exact`: the dense FFN stays, as the always-on shared expert, and the merge layer starts at zero. The routed
path then adds an exact 0 to every token: the logits keep every bit, and the first training step moves the merge layer.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedConfig

from mhmoe.errors import UserError

from ..sizes import Sizes
from .strategy import ConversionStrategy, Promise


if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..tensors import DenseFFN


class Exact(ConversionStrategy):
    """The dense FFN as shared expert, the merge layer at zero, the rest random: see the head of this file."""

    name = "exact"
    summary = "dense FFN as shared expert, merge layer at zero; logits stay equal to the bit"
    promise = Promise(
        in_short="every logit is equal to the bit",
        text="the logits equal the dense model's to the bit, in every floating-point type. The dense FFN is the "
        "shared expert and the merge layer is zero, so the routed path adds nothing until training moves it.",
        max_logit_difference=0.0,
    )
    untrained = (
        "It says what the dense model says; router and experts are random, and only training makes use of them."
    )
    keeps_ffns = True
    made_from = {
        f"shared_expert.{name}_proj.{kind}": f"{name}_proj.{kind}"
        for name in ("gate", "up", "down")
        for kind in ("weight", "bias")
    }

    family = ("private_experts", "router_input", "moe_latent_size")

    @classmethod
    def shared_width(cls, dense_config: PreTrainedConfig, sizes: Sizes) -> int:
        return cls.needs_width(dense_config.intermediate_size, sizes)

    @classmethod
    def check(cls, recipe: "Recipe") -> None:
        if recipe.config.layer_depths[1] == 0:
            raise UserError(
                "--num-moe-heads 1 has no merge layer, which strategy exact starts at zero; give 2 or more"
            )

    def layer(self, layer: int, ffn: "DenseFFN") -> Iterator[tuple[str, torch.Tensor]]:
        for part, shape in self.shapes.items():
            if part in self.made_from:
                yield part, ffn[self.made_from[part]]
            elif part == "merge_layer.weight":
                yield part, torch.zeros(shape)
            elif part == "gate.weight":
                yield part, self.router(layer, lambda: self.fresh(layer, "head_layer.weight"))
            else:
                yield part, self.fresh(layer, part)
