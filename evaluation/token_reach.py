"""How many different experts the items of a vocabulary reach. Shapes as in routing.py."""

from collections.abc import Sequence

import torch

from .routing import add_at, by_token, different_experts


class TokenReach:
    """
    For every item of the vocabulary, the mean number of different experts that its sub-tokens reach, over all its
    occurrences and all layers: P1's figure 7 (arXiv 2404.15045), where ambiguous words reach more than others. Exact:
    integers throughout. What it holds grows with the vocabulary, not with the text.

    Args:
        vocab_size: V.

    Attributes:
        occurrences: (V,), int64. How often each item was counted.
        reached: (V,), int64. Different experts of all its occurrences, in all layers together.
    """

    def __init__(self, vocab_size: int):
        self.occurrences = torch.zeros(vocab_size, dtype=torch.int64)
        self.reached = torch.zeros(vocab_size, dtype=torch.int64)
        self._num_layers = 1

    def add(self, chosen: Sequence[torch.Tensor], input_ids: torch.Tensor, mask: torch.Tensor) -> None:
        """
        Count one forward.

        Args:
            chosen: for each layer (S, k), as `RoutingRecorder.chosen` gives it.
            input_ids: (B, T).
            mask: (B, T), 0 at the tokens that do not count.
        """
        counts = mask.bool().flatten()
        num_heads = len(chosen[0]) // len(counts)
        items = input_ids.flatten()[counts]
        experts = (different_experts(by_token(choices, num_heads)[counts]) for choices in chosen)
        reached = sum(experts, torch.zeros_like(items))  # (tokens,)
        add_at(self.occurrences, items, torch.ones_like(items))
        add_at(self.reached, items, reached)
        self._num_layers = len(chosen)

    @property
    def experts_per_token(self) -> torch.Tensor:
        """(V,), float64: the mean over an item's occurrences and the layers, from 1 to h * k; 0 if it was not seen."""
        return self.reached.double() / (self.occurrences * self._num_layers).clamp(min=1)

    def extremes(self, number: int, min_count: int) -> tuple[list[int], list[int]]:
        """
        The items that reach most experts, and those that reach fewest, with the most extreme first; of equals the one
        that occurs more often.

        Args:
            number: of items in each list, at most.
            min_count: occurrences from which an item's mean is taken to say something.
        """
        items = (self.occurrences >= max(min_count, 1)).nonzero().flatten().tolist()
        means, occurrences = self.experts_per_token.tolist(), self.occurrences.tolist()
        most = sorted(items, key=lambda item: (-means[item], -occurrences[item], item))
        fewest = sorted(items, key=lambda item: (means[item], -occurrences[item], item))
        return most[:number], fewest[:number]
