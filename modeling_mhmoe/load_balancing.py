"""The losses of MH-MoE's routers. This file travels to the Hub: it imports only torch and its siblings."""

from collections.abc import Sequence

import torch
from torch import distributed

from .routers import SCORES


def padding_mask(attention_mask: torch.Tensor | None, tokens: int) -> torch.Tensor | None:
    """Of the last `tokens` that an attention mask `(batch, cached and new tokens)` covers: 0 at padding."""
    # `generate` may have prepared a mask for each kind of layer instead
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        return attention_mask[:, -tokens:]  # the cached tokens were routed before
    return None


def load_balancing_loss(
    router_logits: tuple[torch.Tensor, ...],
    num_experts_per_tok: int,
    num_moe_heads: int,
    attention_mask: torch.Tensor | None = None,
    over_processes: bool = False,
    scoring_func: str = "softmax",
    biases: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    P1 eq. 10 over sub-tokens, pooled over the layers as transformers' MoE models pool theirs:
    `E * sum_p (share of sub-tokens routed to p) * (mean router probability of p)`, which is k for a perfect balance.
    Where gates do not sum to one, the probability of p is its share of their sum (DeepSeek-V3 eq. 19).

    Args:
        router_logits: for every MH-MoE layer, `(batch * tokens * num_moe_heads, num_experts)`.
        num_experts_per_tok: experts that each sub-token is routed to, k.
        num_moe_heads: sub-tokens of a token, h.
        attention_mask: `(batch, tokens)`, 0 at padding, whose h sub-tokens then do not count.
        over_processes: take the share of sub-tokens over all processes of a data-parallel step. With it the mean of
            the processes' losses has the gradient that one process would find on the whole batch; without it each
            process balances its own part.
        scoring_func: "softmax" or "sigmoid", which makes gates of logits.
        biases: for every MH-MoE layer, what its router adds to the gates to choose by, `(num_experts,)`.

    Returns:
        A scalar tensor, float32.
    """
    num_experts = router_logits[0].shape[-1]
    device = router_logits[0].device
    if attention_mask is not None:
        counted = attention_mask.reshape(-1, 1).to(device, torch.float32).repeat_interleave(num_moe_heads, dim=0)
    routed = torch.zeros(num_experts, device=device)  # sub-tokens routed to each expert, over all layers
    probability = torch.zeros(num_experts, device=device)  # the router's probabilities, summed likewise
    rows = torch.zeros((), device=device)
    for layer, logits in enumerate(router_logits):
        gates = SCORES[scoring_func](logits.to(device))  # (B * T * h, E)
        ranks = gates if biases is None else gates + biases[layer].to(device)
        chosen = torch.zeros_like(gates).scatter_(1, ranks.topk(num_experts_per_tok).indices, 1.0)
        probabilities = gates if scoring_func == "softmax" else gates / gates.sum(dim=-1, keepdim=True)
        if attention_mask is not None:
            probabilities, chosen = probabilities * counted, chosen * counted
        routed = routed + chosen.sum(dim=0)
        probability = probability + probabilities.sum(dim=0)
        rows = rows + (counted.sum() if attention_mask is not None else len(logits))

    totals = torch.cat([routed, rows[None]])  # a copy, since autograd keeps `rows`
    if over_processes:
        distributed.all_reduce(totals)
    return num_experts * (totals[:-1] / totals[-1] * probability / rows).sum()


def z_loss(
    router_logits: tuple[torch.Tensor, ...], num_moe_heads: int, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """
    ST-MoE's router z-loss (arXiv 2202.08906, eq. 5), the mean over sub-tokens and layers of `logsumexp(logits)^2`.
    Arguments as above; a scalar tensor, float32.
    """
    device = router_logits[0].device
    squares = torch.stack([logits.to(device, torch.float32).logsumexp(dim=-1).square() for logits in router_logits])
    if attention_mask is None:
        return squares.mean()
    counted = attention_mask.reshape(-1).to(device, torch.float32).repeat_interleave(num_moe_heads)
    return (squares * counted).sum() / (counted.sum() * len(squares))
