"""
Strategy `random`: embeddings, attention and norms are the dense model's, every FFN is an MH-MoE layer that starts
random. It is the start that other strategies are measured against; it says nothing sensible before training.
"""

import torch

from mhmoe import MHMoEConfig
from mhmoe.errors import UserError

from .strategy import ConversionStrategy, Dense, seeded_generator


class RandomExperts(ConversionStrategy):
    """
    Fresh head layer, router, experts, merge layer and, where asked for, shared expert: normal, with the dense config's
    `initializer_range`, as transformers itself starts such a model; biases zero. FFNs that start this small leave what
    attention adds undisturbed.
    """

    name = "random"

    def shared_width(self, asked: int | None) -> int:
        return asked or 0

    def check(self, config: MHMoEConfig) -> None:
        if self.router_init != "random":
            raise UserError(
                f"--router-init {self.router_init}: strategy {self.name} starts with fresh FFNs, whose hidden states "
                "the dense model's text says nothing about; leave it out"
            )

    def sources(self, name: str) -> tuple[str, ...]:
        return ()

    def value(self, name: str, shape: tuple[int, ...], dense: Dense) -> torch.Tensor:
        value = torch.zeros(shape)
        if name.endswith(".bias"):
            return value
        return value.normal_(0, self.dense.initializer_range, generator=seeded_generator(name, self.seed))
