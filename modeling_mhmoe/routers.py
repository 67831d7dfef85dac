"""Routers: the experts that a sub-token reaches, and the weights of their outputs.

This file travels to the Hub: it imports only torch, transformers and its siblings.
Shapes: S sub-tokens of d/h numbers, E experts, k experts per sub-token, r router dimension.
P1 is arXiv 2404.15045, X-MoE is arXiv 2204.09179, DeepSeek-V3 is arXiv 2412.19437.
"""

import torch
from torch import nn
from torch.nn.functional import linear, logsigmoid, normalize
from transformers import initialization as init

from .configuration_mhmoe import ROUTER_TYPES, MHMoEConfig, RouterType


def softmax(router_logits: torch.Tensor) -> torch.Tensor:
    return router_logits.softmax(dim=-1, dtype=torch.float32)


def sigmoid(router_logits: torch.Tensor) -> torch.Tensor:
    return router_logits.float().sigmoid()


SCORES = {"softmax": softmax, "sigmoid": sigmoid}  # `scoring_func`: scores, in float32, of router logits (S, E)


def shares(router_logits: torch.Tensor, scoring_func: str) -> torch.Tensor:
    """The scores of logits (S, n) over their sum, (S, n) in float32 (DeepSeek-V3 eq. 13 for sigmoids)."""
    if scoring_func == "softmax":
        return softmax(router_logits)
    # by their logarithms: below -88 sigmoids are too small for float32, and so is their sum if all are
    return softmax(logsigmoid(router_logits.float()))


class MHMoETopKRouter(nn.Module):
    """Softmax over all experts, of which each sub-token keeps its k best (P1 eq. 4 and 5). Base of all routers."""

    def __init__(self, config: MHMoEConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.scoring_func = config.scoring_func
        self.num_heads, self.num_experts = config.num_moe_heads, config.num_experts
        self.private_experts, self.router_input = config.private_experts, config.router_input
        self.weight = nn.Parameter(torch.empty(config.router.rows(config), config.router.input_size(config)))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Router logits (S, E), weights (S, k) and indices (S, k) of the chosen experts, of sub-tokens (S, d/h), or of
        tokens or latents (B, T, d or l). The experts of all heads are counted on where they are private: those of
        head j from jE.
        """
        router_logits = self.logits(hidden_states)
        top_k_index = self.choose(router_logits)
        if self.norm_topk_prob:
            top_k_weights = shares(router_logits.gather(-1, top_k_index), self.scoring_func)
        else:
            top_k_weights = SCORES[self.scoring_func](router_logits).gather(-1, top_k_index)
        if self.private_experts:
            first = torch.arange(0, self.num_heads * self.num_experts, self.num_experts, device=top_k_index.device)
            top_k_index = (top_k_index.unflatten(0, (-1, self.num_heads)) + first[:, None]).flatten(0, 1)
        return router_logits, top_k_weights.to(hidden_states.dtype), top_k_index

    def init_weights(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(S, E), of what the router sees."""
        if self.router_input != "sub_token":
            return linear(hidden_states, self.weight).view(-1, self.num_experts)  # (B, T, h * E)
        if self.private_experts:
            sub_tokens = hidden_states.unflatten(0, (-1, self.num_heads))  # (B * T, h, d/h)
            rows = self.weight.unflatten(0, (self.num_heads, -1))  # (h, E, d/h)
            return torch.einsum("thd,hed->the", sub_tokens, rows).flatten(0, 1)
        return linear(hidden_states, self.weight)

    def choose(self, router_logits: torch.Tensor) -> torch.Tensor:
        """(S, E) -> indices (S, k), from 0 in each head, of the experts with the largest scores, the largest first."""
        # whose logits are the largest; sigmoids of different logits may all round to 0 or 1
        return router_logits.float().topk(self.top_k, dim=-1).indices


class XMoERouter(MHMoETopKRouter):
    """
    X-MoE's router, on which P1 builds: logits are cosines, over a learnable temperature tau, between a sub-token x
    projected to r numbers and expert embeddings e_p: cos(P x, e_p) / tau. Scores are their softmax, or their sigmoids
    where `scoring_func` says so.
    """

    def __init__(self, config: MHMoEConfig):
        super().__init__(config)
        width = config.router.width(config)
        self.start_temperature = config.router_temperature or {"softmax": 0.3, "sigmoid": 0.07}[config.scoring_func]
        self.projection = nn.Parameter(torch.empty(width, config.sub_token_size))
        self.weight = nn.Parameter(torch.empty(config.num_experts, width))
        # tau = start * exp(parameter): positive whatever a step does, and weight decay draws it to where it started
        self.log_temperature = nn.Parameter(torch.zeros(1))

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        init.normal_(self.projection, mean=0.0, std=std)
        init.zeros_(self.log_temperature)

    @property
    def temperature(self) -> torch.Tensor:
        return self.start_temperature * self.log_temperature.float().exp()

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        projected = linear(hidden_states, self.projection)  # (S, r)
        # lengths below 1e-4 count as that: a zero vector has logits of zero, and gradients that are finite
        directions = normalize(projected.float(), dim=-1, eps=1e-4)
        return linear(directions, normalize(self.weight.float(), dim=-1, eps=1e-4)) / self.temperature


class BiasedTopKRouter(MHMoETopKRouter):
    """
    DeepSeek-V3's choice (its eq. 16): the k experts are those of the largest score plus bias, their weights are the
    scores without it. The bias follows the experts' loads, see `bias_balancing`, and takes no gradient.
    """

    def __init__(self, config: MHMoEConfig):
        super().__init__(config)
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_routed_experts, dtype=torch.float32))
        # no buffers: data parallelism would overwrite every process's own counts with those of the first
        self.chosen: torch.Tensor | None = None  # (S, k), of the last training forward, recomputed ones included
        self.loads: torch.Tensor | None = (
            None  # as the bias, int64, sub-tokens sent to each expert since the last update
        )

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        init.zeros_(self.e_score_correction_bias)

    def _apply(self, *args, **kwargs):
        super()._apply(*args, **kwargs)
        # in half precision a bias would soon be too large for its steps to change it
        self.e_score_correction_bias = self.e_score_correction_bias.float()
        return self

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As of the base."""
        outputs = super().forward(hidden_states)
        if self.training:
            self.chosen = outputs[2]
        return outputs

    def choose(self, router_logits: torch.Tensor) -> torch.Tensor:
        scores = SCORES[self.scoring_func](router_logits.detach())
        if self.private_experts:
            ranks = scores.view(-1, len(self.e_score_correction_bias)) + self.e_score_correction_bias
            ranks = ranks.view(scores.shape)
        else:
            ranks = scores + self.e_score_correction_bias
        return ranks.topk(self.top_k, dim=-1).indices

    def biases_by_head(self) -> tuple[torch.Tensor, ...]:
        """For each head, those of the experts that it can choose, (E,)."""
        return self.e_score_correction_bias.view(-1, self.num_experts).expand(self.num_heads, -1).unbind(0)


class BiasedXMoERouter(BiasedTopKRouter, XMoERouter):
    """Logits and scores of [`XMoERouter`], choice of [`BiasedTopKRouter`]."""


ROUTERS: dict[tuple[str, bool], type[MHMoETopKRouter]] = {  # by `router_type`, and whether a bias balances
    ("softmax", False): MHMoETopKRouter,
    ("softmax", True): BiasedTopKRouter,
    ("xmoe", False): XMoERouter,
    ("xmoe", True): BiasedXMoERouter,
}


def register_router(name: str, router_class: type[MHMoETopKRouter], router_type: RouterType | None = None) -> None:
    """
    Makes a router known, which `router_type=name` in a config then chooses; with a `router_bias_update_rate`, too,
    where its logits and scores stay, and the choice is that of [`BiasedTopKRouter`].

    Args:
        name: a new name.
        router_class: a subclass of [`MHMoETopKRouter`], or of another router here.
        router_type: the config's fields that it takes, its checks and its costs; by default the softmax
            router's.

    Raises:
        ValueError: there is a router of this name.
    """
    if name in ROUTER_TYPES:
        raise ValueError(f"router_type={name!r} is known already; choose another name.")
    ROUTER_TYPES[name] = router_type or RouterType()
    ROUTERS[name, False] = router_class
    ROUTERS[name, True] = type(f"Biased{router_class.__name__}", (BiasedTopKRouter, router_class), {})
