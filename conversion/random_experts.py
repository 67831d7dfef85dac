"""
Strategy `random`: embeddings, attention and norms are the dense model's, every FFN is an MH-MoE layer that starts
random. It is the start that other strategies are measured against; it says nothing sensible before training.
"""

import torch

from mhmoe import MHMoEConfig

from .strategy import ConversionStrategy, Dense


class RandomExperts(ConversionStrategy):
    """
    Fresh head layer, router, experts, merge layer and, where asked for, shared expert.

    What writes into the residual stream is scaled by 1 / sqrt(2 layers), as is usual for deep decoders that start
    random, so that the noise of untrained FFNs does not drown what attention adds.
    """

    name = "random"

    def shared_width(self, asked: int | None) -> int:
        return asked or 0

    def check(self, config: MHMoEConfig) -> None:
        pass

    def sources(self, name: str) -> tuple[str, ...]:
        return ()

    def value(self, name: str, shape: tuple[int, ...], dense: Dense) -> torch.Tensor:
        value = self._fresh(name, shape)
        # without a merge layer, for one head, the experts' last projection has its place
        last = (".mlp.merge_layer.weight", ".mlp.shared_expert.down_proj.weight", ".mlp.experts.down_proj")
        if name.endswith(last) and shape[-2] == self.dense.hidden_size:
            value /= (2 * self.dense.num_hidden_layers) ** 0.5
        return value
