"""Which experts the sub-tokens reach. Needs only torch: evaluation, training logs and other tools share it.

Shapes: B sequences, T tokens, h MoE heads, E experts, k experts per sub-token, L MH-MoE layers; S = B * T * h
sub-tokens, the head index runs fastest. P1 is arXiv 2404.15045.

A plain sparse MoE of transformers' own is read as MH-MoE with one head: its tokens are its sub-tokens.
"""

import math
import re
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from .model_types import MODEL_TYPES as MODEL_TYPES


# in transformers, the experts of a layer are one module, called with the sub-tokens, the chosen experts, their weights
EXPERTS_NAME = re.compile(r"(.*?)(?:^|\.)layers?\.(\d+)\.(?:\w+\.)+experts$")
ENCODERS = "mhmoe_"  # how the model types of encoders with MH-MoE layers begin
NUM_EXPERTS = (
    "num_routed_experts",  # MH-MoE's own, of all heads
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
)  # names of the same field of a config


class RoutingRecorder:
    """
    Remembers, while it is entered, which experts each layer's sub-tokens were sent to in a model's last forward.

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
            A model of another kind, or without MoE layers, has no `layers` to record. Of a model with several
            encoders, as CLIP has, one of these: `model.vision_model`.
        model_types: the kinds of model that are recorded beside encoders; `None` for each whose experts run on
            transformers' experts backends.

    Attributes:
        layers: indices (from 0) of the decoder's or encoder's layers that have experts, ascending.
        decoder: the module with these layers, which is called once in each forward; `None` if there are none.

    Raises:
        ValueError: `model` has several encoders.
    """

    def __init__(self, model: nn.Module, model_types: Collection[str] | None = ("mhmoe",)):
        configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
        configs = [config for config in configs if hasattr(config, "model_type")]
        if model_types is not None:
            configs = [
                config
                for config in configs
                if config.model_type in model_types or str(config.model_type).startswith(ENCODERS)
            ]
        self._config: Any = next(iter(configs), None)
        experts = {}
        self.decoder: nn.Module | None = None
        if self._config is not None:
            for name, module in model.named_modules():
                match = EXPERTS_NAME.fullmatch(name)
                if match and (model_types is not None or _run_on_backends(module)):
                    if int(match[2]) in experts:
                        raise ValueError(
                            f"{type(model).__name__} has several encoders; record one, such as {match[1]}."
                        )
                    experts[int(match[2])] = module
                    self.decoder = model.get_submodule(match[1])
        self._experts: dict[int, nn.Module] = dict(sorted(experts.items()))
        self._chosen: dict[int, torch.Tensor] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def layers(self) -> list[int]:
        return list(self._experts)

    @property
    def chosen(self) -> list[torch.Tensor]:
        """The experts that the last forward's sub-tokens were routed to: for each layer an integer tensor (S, k)."""
        if len(self._chosen) != len(self._experts):
            raise RuntimeError("no forward was recorded: run the model inside `with recorder:`")
        return [self._chosen[layer] for layer in self._experts]

    def new_counts(self) -> "ExpertCounts":
        """Counts at zero, for this model's layers and experts."""
        config = self._config.get_text_config()
        num_experts = next(getattr(config, name) for name in NUM_EXPERTS if hasattr(config, name))
        heads, private = getattr(self._config, "num_moe_heads", 1), getattr(self._config, "private_experts", False)
        return ExpertCounts(self.layers, num_experts, heads, private)

    def __enter__(self) -> "RoutingRecorder":
        for layer, experts in self._experts.items():

            def remember(_module, inputs, layer=layer):
                self._chosen[layer] = inputs[1].detach()

            self._hooks.append(experts.register_forward_pre_hook(remember))
        return self

    def __exit__(self, *_exception) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._chosen.clear()


def _run_on_backends(experts: nn.Module) -> bool:
    """Whether the module, or what an adapter has wrapped, is of a class with `use_experts_implementation`."""
    return any(hasattr(module, "has_gate") for module in experts.modules())


class ExpertCounts:
    """
    How often each expert of each MH-MoE layer was chosen, over any number of forwards. Exact: integers throughout.

    Args:
        layers: indices of the decoder layers that are counted, L of them.
        num_experts: E, of all heads together.
        num_heads: h, for forwards that are counted without a mask; a mask says it by its number of tokens.
        private_experts: whether the experts are the heads' own: the first E/h of the first head, and so on.

    Attributes:
        counts: (L, E), int64. The number of sub-tokens that were routed to each expert; a layer's row sums to
            k * num_sub_tokens.
        reach: (L, E + 1), int64. The number of tokens whose h sub-tokens, together, were routed to exactly so many
            different experts, from 0 to E (at least 1, at most h * k); a layer's row sums to num_tokens.
        num_sub_tokens: sub-tokens that passed each layer, h for every token that counts.
        num_tokens: tokens that count.
    """

    def __init__(self, layers: Sequence[int], num_experts: int, num_heads: int = 1, private_experts: bool = False):
        self.layers = list(layers)
        self.num_heads = num_heads
        self.private_experts = private_experts
        self.counts = torch.zeros(len(self.layers), num_experts, dtype=torch.int64)
        self.reach = torch.zeros(len(self.layers), num_experts + 1, dtype=torch.int64)
        self.num_sub_tokens = 0
        self.num_tokens = 0

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
        if mask is None and num_sub_tokens % self.num_heads == 0:
            mask = torch.ones(num_sub_tokens // self.num_heads)
        elif mask is None or mask.numel() == 0 or num_sub_tokens % mask.numel():
            tokens = f"tokens of {self.num_heads}" if mask is None else f"a mask of {tuple(mask.shape)} tokens"
            raise ValueError(f"{num_sub_tokens} sub-tokens cannot belong to {tokens}.")
        times = mask.reshape(-1).cpu().long()
        num_heads = num_sub_tokens // max(len(times), 1)
        counted = times.nonzero().squeeze(1)
        times = times[counted]
        for row, reach, choices in zip(self.counts, self.reach, chosen, strict=True):
            experts = by_token(choices, num_heads)[counted.to(choices.device)]  # (tokens, h * k)
            weights = times.to(choices.device)
            add_at(row, experts, weights[:, None].expand_as(experts))
            add_at(reach, different_experts(experts), weights)
        self.num_sub_tokens += int(times.sum()) * num_heads
        self.num_tokens += int(times.sum())

    def name(self, expert: int) -> str:
        """Of a column of `counts`: "expert 7", or "head 1, expert 2" where experts are private; from 0."""
        if not self.private_experts:
            return f"expert {expert}"
        head, own = divmod(expert, self.counts.shape[1] // self.num_heads)
        return f"head {head}, expert {own}"

    def __add__(self, other: "ExpertCounts") -> "ExpertCounts":
        """The counts of both, for other batches, tasks or processes; ValueError if their layers or experts differ."""
        if (self.layers, self.counts.shape) != (other.layers, other.counts.shape):
            raise ValueError(
                f"counts of layers {self.layers} with {self.counts.shape[1]} experts cannot be added to counts of "
                f"layers {other.layers} with {other.counts.shape[1]} experts."
            )
        total = ExpertCounts(self.layers, self.counts.shape[1], self.num_heads, self.private_experts)
        total.counts = self.counts + other.counts
        total.reach = self.reach + other.reach
        total.num_sub_tokens = self.num_sub_tokens + other.num_sub_tokens
        total.num_tokens = self.num_tokens + other.num_tokens
        return total

    @property
    def load(self) -> torch.Tensor:
        """(L, E), float64: each expert's share of its layer's choices. A row sums to 1, or is 0 if nothing counted."""
        return self.counts.double() / self.counts.sum(dim=1, keepdim=True).clamp(min=1)

    @property
    def frequency(self) -> torch.Tensor:
        """(L, E), float64: selections of each expert per token, as in P1's figure 5. A row sums to h * k."""
        return self.counts.double() / max(self.num_tokens, 1)

    @property
    def share_activated(self) -> torch.Tensor:
        """(L,), float64: the share of a layer's experts that at least one sub-token reached."""
        return self.share_above(0.0)

    def share_above(self, threshold: float) -> torch.Tensor:
        """
        P1's figure 1a: experts activated over experts that there are.

        The paper leaves open how often an expert must be chosen to count, and in how much text, on which any count of
        "at least once" depends. Here an expert counts whose `frequency` exceeds `threshold`, a number of selections
        per token; 0 is at least once. Compare models on the same text only.

        Returns:
            (L,), float64. All layers have E experts, so the ratio of all layers together is the mean.
        """
        return (self.frequency > threshold).double().mean(dim=1)

    @property
    def experts_per_token(self) -> torch.Tensor:
        """(L,), float64: the mean number of different experts that a token's sub-tokens reach (P1 figure 7)."""
        numbers = torch.arange(self.reach.shape[1], dtype=torch.float64)
        return self.reach.double() @ numbers / max(self.num_tokens, 1)

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
            `num_tokens`, `num_sub_tokens`; over all layers `share_activated` (of all layers' experts),
            `experts_per_token` and `entropy` (the means) and `max_over_mean_load` (the largest); and `layers`, a list
            with the index, these four figures, `counts` and `load` of each layer; `experts`, the names of those, in
            their order, where experts are private.
        """
        figures = ("share_activated", "experts_per_token", "entropy", "max_over_mean_load")
        by_layer = {name: getattr(self, name) for name in figures}
        return {
            "num_tokens": self.num_tokens,
            "num_sub_tokens": self.num_sub_tokens,
            **{
                name: (values.amax() if name.startswith("max") else values.mean()).item()
                for name, values in by_layer.items()
            },
            **({"experts": list(map(self.name, range(self.counts.shape[1])))} if self.private_experts else {}),
            "layers": [
                {
                    "layer": layer,
                    **{name: values[row].item() for name, values in by_layer.items()},
                    "counts": self.counts[row].tolist(),
                    "load": self.load[row].tolist(),
                }
                for row, layer in enumerate(self.layers)
            ],
        }


def by_token(chosen: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(S, k) -> (tokens, h * k): the choices of a token's sub-tokens side by side."""
    return chosen.reshape(-1, num_heads * chosen.shape[-1])


def different_experts(experts: torch.Tensor) -> torch.Tensor:
    """(tokens, h * k) -> (tokens,): how many of a token's choices are different, from 1 to h * k."""
    return experts.sort(dim=1).values.diff(dim=1).ne(0).sum(dim=1) + 1


def add_at(row: torch.Tensor, places: torch.Tensor, amounts: torch.Tensor) -> None:
    """Add `amounts`, integers on any device, to the elements of `row` at `places`."""
    row += torch.zeros_like(row, device=places.device).scatter_add_(0, places.flatten(), amounts.flatten()).cpu()
