"""
Strategy `random`: embeddings, attention and norms are the dense model's, every FFN is an MH-MoE layer that starts
random. It is the start that other strategies are measured against; it says nothing sensible before training.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedConfig

from mhmoe.configuration import parity
from mhmoe.errors import UserError, one_line

from ..sizes import Sizes, ffn_matrices
from .strategy import ConversionStrategy, Promise


if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..tensors import DenseFFN


class Random(ConversionStrategy):
    """
    Fresh head layer, router, experts, merge layer and, where asked for, shared expert: normal, with the dense config's
    `initializer_range`, as transformers itself starts such a model; biases zero. FFNs that start this small leave what
    attention adds undisturbed.
    """

    name = "random"
    summary = "all but the FFNs is copied, the experts start untrained"
    promise = Promise(
        in_short="the copied tensors are equal",
        text="embeddings, attention and norms are the dense model's, to the bit. Nothing is promised of the logits: "
        "no part of the dense FFNs is in it.",
    )
    untrained = (
        "Its FFNs are **untrained**: every MH-MoE layer is random, and the text that the model writes is noise. It is "
        "a place to start training from, and the baseline for other conversions."
    )
    defaults = {"shared_expert_intermediate_size": "none"}
    family = ("private_experts", "router_input", "moe_latent_size")

    @classmethod
    def shared_width(cls, dense_config: PreTrainedConfig, sizes: Sizes) -> int:
        return sizes.shared_expert_intermediate_size or 0

    @classmethod
    def match_dense(cls, dense_config: PreTrainedConfig, sizes: Sizes) -> Sizes:
        """As for the others where a shared expert is asked for; if not, it gets what the routed experts leave."""
        if sizes.shared_expert_intermediate_size is not None:
            return super().match_dense(dense_config, sizes)
        d, ff = dense_config.hidden_size, dense_config.intermediate_size
        heads, top_k, inner = sizes.num_moe_heads, sizes.num_experts_per_tok, sizes.moe_intermediate_size
        try:
            matrices, latent = ffn_matrices(dense_config), sizes.moe_latent_size
            _, shared = parity.match_dense(d, ff, heads, top_k, size=inner, matrices=matrices, latent_size=latent)
        except ValueError as error:
            raise UserError(one_line(error)) from error
        return replace(sizes, shared_expert_intermediate_size=shared)

    @classmethod
    def check(cls, recipe: "Recipe") -> None:
        if recipe.options.router_init != "random":
            raise UserError(
                f"--router-init {recipe.options.router_init}: strategy {cls.name} starts with fresh FFNs, whose "
                "hidden states the dense model's text says nothing about; leave it out"
            )

    def layer(self, layer: int, ffn: "DenseFFN") -> Iterator[tuple[str, torch.Tensor]]:
        for part, shape in self.shapes.items():
            value = torch.zeros(shape)
            if not part.endswith(".bias"):
                value.normal_(0, self.dense_config.initializer_range, generator=self.generator(layer, part))
            yield part, value
