"""Which experts the sub-tokens reach. Needs only torch: evaluation, training logs and other tools share it.

Shapes: B sequences, T tokens, h MoE heads, E experts, k experts per sub-token, L MH-MoE layers; S = B * T * h
sub-tokens, the head index runs fastest. P1 is arXiv 2404.15045.
"""

import math
import re
from collections.abc import Sequence

import torch
from torch import nn


ROUTER_NAME = re.compile(r"(?:^|\.)layers\.(\d+)\.mlp\.gate$")


class RoutingRecorder:
    """
    Remembers, while it is entered, which experts each router of an MH-MoE model chose in the model's last forward.

    ```python
    with RoutingRecorder(model) as recorder:
        counts = recorder.new_counts()
        for batch in batches:
            model(**batch)
            counts.add(recorder.chosen, batch["attention_mask"])
    print(counts.summary())
    ```

    Args:
        model: the base model or one with a head, also as remote code and inside a wrapper (DDP, accelerate, PEFT).
            A model without MH-MoE layers has no `layers` to record.

    Attributes:
        layers: indices (from 0) of the decoder layers that have a router, ascending.
    """

    def __init__(self, model: nn.Module):
        configs = (getattr(module, "config", None) for module in model.modules())
        self._config = next((config for config in configs if getattr(config, "model_type", None) == "mhmoe"), None)
        routers = {}
        if self._config is not None:
            for name, module in model.named_modules():
                if match := ROUTER_NAME.search(name):
                    routers[int(match[1])] = module
        self._routers: dict[int, nn.Module] = dict(sorted(routers.items()))
        self._chosen: dict[int, torch.Tensor] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def layers(self) -> list[int]:
        return list(self._routers)

    @property
    def chosen(self) -> list[torch.Tensor]:
        """The experts that the last forward's sub-tokens were routed to: for each layer an integer tensor (S, k)."""
        if len(self._chosen) != len(self._routers):
            raise RuntimeError("no forward was recorded: run the model inside `with recorder:`")
        return [self._chosen[layer] for layer in self._routers]

    def new_counts(self) -> "ExpertCounts":
        """Counts at zero, for this model's layers and experts."""
        return ExpertCounts(self.layers, self._config.num_experts)

    def __enter__(self) -> "RoutingRecorder":
        for layer, router in self._routers.items():

            def remember(_module, _inputs, output, layer=layer):
                self._chosen[layer] = output[-1].detach()  # a router returns logits, weights, chosen experts

            self._hooks.append(router.register_forward_hook(remember))
        return self

    def __exit__(self, *_exception) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._chosen.clear()


class ExpertCounts:
    """
    How often each expert of each MH-MoE layer was chosen, over any number of forwards. Exact: integers throughout.

    Args:
        layers: indices of the decoder layers that are counted, L of them.
        num_experts: E.

    Attributes:
        counts: (L, E), int64. The number of sub-tokens that were routed to each expert; a layer's row sums to
            k * num_sub_tokens. `counts / num_sub_tokens` is what P1's figure 5 draws: selections per (sub-)token.
        num_sub_tokens: sub-tokens that passed each layer, h for every token that counts.
    """

    def __init__(self, layers: Sequence[int], num_experts: int):
        self.layers = list(layers)
        self.counts = torch.zeros(len(self.layers), num_experts, dtype=torch.int64)
        self.num_sub_tokens = 0

    def add(self, chosen: Sequence[torch.Tensor], mask: torch.Tensor | None = None) -> None:
        """
        Count one forward.

        Args:
            chosen: for each layer (S, k), as `RoutingRecorder.chosen` gives it.
            mask: (B, T), how often each token counts, and with it all its h sub-tokens: an attention mask (0 at
                padding), booleans, or any non-negative integers. `None` counts everything once.

        Raises:
            ValueError: the sub-tokens are not a multiple of the mask's tokens.
        """
        num_sub_tokens = len(chosen[0])
        if mask is None:
            mask = torch.ones(num_sub_tokens)  # each sub-token a token of its own
        elif mask.numel() == 0 or num_sub_tokens % mask.numel():
            raise ValueError(f"{num_sub_tokens} sub-tokens cannot belong to a mask of {tuple(mask.shape)} tokens.")
        times = mask.reshape(-1).cpu().long()
        num_heads = num_sub_tokens // max(len(times), 1)
        counted = times.nonzero().squeeze(1)
        times = times[counted]
        for row, choices in zip(self.counts, chosen, strict=True):
            experts = choices.reshape(-1, num_heads * choices.shape[-1])[counted.to(choices.device)]  # (tokens, h * k)
            weights = times.to(choices.device)[:, None].expand_as(experts)
            row += (
                torch.zeros_like(row, device=choices.device)
                .scatter_add_(0, experts.flatten(), weights.flatten())
                .cpu()
            )
        self.num_sub_tokens += int(times.sum()) * num_heads

    def __add__(self, other: "ExpertCounts") -> "ExpertCounts":
        """The counts of both, for other batches, tasks or processes; ValueError if their layers or experts differ."""
        if (self.layers, self.counts.shape) != (other.layers, other.counts.shape):
            raise ValueError(
                f"counts of layers {self.layers} with {self.counts.shape[1]} experts cannot be added to counts of "
                f"layers {other.layers} with {other.counts.shape[1]} experts."
            )
        total = ExpertCounts(self.layers, self.counts.shape[1])
        total.counts = self.counts + other.counts
        total.num_sub_tokens = self.num_sub_tokens + other.num_sub_tokens
        return total

    @property
    def load(self) -> torch.Tensor:
        """(L, E), float64: each expert's share of its layer's choices. A row sums to 1, or is 0 if nothing counted."""
        return self.counts.double() / self.counts.sum(dim=1, keepdim=True).clamp(min=1)

    @property
    def share_activated(self) -> torch.Tensor:
        """(L,), float64: the share of a layer's experts that at least one sub-token reached (P1 figure 1a)."""
        return (self.counts > 0).double().mean(dim=1)

    @property
    def entropy(self) -> torch.Tensor:
        """(L,), float64: -sum_e load_e log(load_e) / log(E). 1 for a uniform load, 0 if one of the experts has all."""
        num_experts = self.counts.shape[1]
        if num_experts == 1:
            return torch.ones(len(self.layers), dtype=torch.float64)
        return -torch.special.xlogy(self.load, self.load).sum(dim=1) / math.log(num_experts)

    @property
    def max_over_mean_load(self) -> torch.Tensor:
        """(L,), float64: the busiest expert's load over the mean load 1/E. From 1 (uniform) to E."""
        return self.load.amax(dim=1) * self.counts.shape[1]

    def summary(self) -> dict:
        """
        All of the above in plain Python, ready for JSON.

        Returns:
            `num_sub_tokens`; over all layers `share_activated` (of all layers' experts), `entropy` (the mean) and
            `max_over_mean_load` (the largest); and `layers`, a list with the index, these three figures, `counts` and
            `load` of each layer.
        """
        return {
            "num_sub_tokens": self.num_sub_tokens,
            "share_activated": self.share_activated.mean().item(),
            "entropy": self.entropy.mean().item(),
            "max_over_mean_load": self.max_over_mean_load.amax().item(),
            "layers": [
                {
                    "layer": layer,
                    "share_activated": self.share_activated[row].item(),
                    "entropy": self.entropy[row].item(),
                    "max_over_mean_load": self.max_over_mean_load[row].item(),
                    "counts": self.counts[row].tolist(),
                    "load": self.load[row].tolist(),
                }
                for row, layer in enumerate(self.layers)
            ],
        }
