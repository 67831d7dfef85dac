"""The losses of MH-MoE's routers. This file travels to the Hub: it imports only torch and its siblings."""

from collections.abc import Sequence

import torch
from torch import distributed

from .routers import SCORES, shares


def padding_mask(attention_mask: torch.Tensor | None, tokens: int) -> torch.Tensor | None:
    """Of the last `tokens` that an attention mask `(batch, cached and new tokens)` covers: 0 at padding."""
    # `generate` may have prepared a mask for each kind of layer instead
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        return attention_mask[:, -tokens:]  # the cached tokens were routed before
    return None


def by_head(router_logits: Sequence[torch.Tensor], num_moe_heads: int) -> tuple[torch.Tensor, ...]:
    """
    The router logits of every MH-MoE layer, `(batch * tokens * num_moe_heads, num_experts)` with the head index
    fastest, as `num_moe_heads` views of `(batch * tokens, num_experts)`: layer by layer, and in each head by head.
    So a model returns them: tools that compute transformers' load balancing loss themselves, of a row for every
    token that the attention mask has, then find the right one, that of h times as many layers.
    """
    return tuple(head for logits in router_logits for head in logits.unflatten(0, (-1, num_moe_heads)).unbind(1))


def load_balancing_loss(
    router_logits: Sequence[torch.Tensor],
    num_experts_per_tok: int,
    attention_mask: torch.Tensor | None = None,
    over_processes: bool = False,
    scoring_func: str = "softmax",
    biases: Sequence[torch.Tensor] | None = None,
    groups: int = 1,
) -> torch.Tensor:
    """
    P1 eq. 10 over sub-tokens, pooled over heads and layers as transformers' MoE models pool their layers:
    `E * sum_p (share of sub-tokens routed to p) * (mean router probability of p)`, which is k for a perfect balance.
    Where scores do not sum to one, the probability of p is its share of their sum (DeepSeek-V3 eq. 19).

    Args:
        router_logits: for every head of every MH-MoE layer, `(batch * tokens, num_experts)`, as a model returns them.
        num_experts_per_tok: experts that each sub-token is routed to, k.
        attention_mask: `(batch, tokens)`, 0 at padding, whose sub-tokens then do not count. Where all is padding, the
            loss is 0.
        over_processes: take the share of sub-tokens over all processes of a data-parallel step. With it the mean of
            the processes' losses has the gradient that one process would find on the whole batch; without it each
            process balances its own part.
        scoring_func: "softmax" or "sigmoid", which makes scores of logits.
        biases: for every entry of `router_logits`, what its router adds to the scores to choose by, `(num_experts,)`.
        groups: heads with experts of their own: the entries of each head are pooled over layers alone, and the loss is
            the mean over heads. So each is balanced as the MoE of its own that it is in MH-LatentMoE (arXiv
            2602.04870), whose authors count loads by layer and head too.

    Returns:
        A scalar tensor, float32.
    """
    num_experts = router_logits[0].shape[-1]
    device = router_logits[0].device
    if attention_mask is not None:
        counted = attention_mask.reshape(-1, 1).to(device, torch.float32)
    routed = [
        torch.zeros(num_experts, device=device)
    ] * groups  # sub-tokens routed to each expert, summed over entries
    probability = [torch.zeros(num_experts, device=device)] * groups  # the router's probabilities, summed likewise
    rows = [torch.zeros((), device=device)] * groups
    for entry, logits in enumerate(router_logits):
        group = entry % groups
        logits = logits.to(device)
        ranks = logits.float() if biases is None else SCORES[scoring_func](logits) + biases[entry].to(device)
        probabilities = shares(logits, scoring_func)  # (B * T, E)
        chosen = torch.zeros_like(probabilities).scatter_(1, ranks.topk(num_experts_per_tok).indices, 1.0)
        if attention_mask is not None:
            probabilities, chosen = probabilities * counted, chosen * counted
        routed[group] = routed[group] + chosen.sum(dim=0)
        probability[group] = probability[group] + probabilities.sum(dim=0)
        rows[group] = rows[group] + (counted.sum() if attention_mask is not None else len(logits))

    own_rows = torch.stack(rows)[:, None]
    totals = torch.cat([torch.stack(routed), own_rows], dim=1)  # a copy, since autograd keeps `rows`
    if over_processes:
        distributed.all_reduce(totals)
    # where all is padding, nothing over one is zero
    loads = totals[:, :-1] / totals[:, -1:].clamp(min=1)
    return num_experts * (loads * torch.stack(probability) / own_rows.clamp(min=1)).sum() / groups


def z_loss(router_logits: Sequence[torch.Tensor], attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """
    ST-MoE's router z-loss (arXiv 2202.08906, eq. 5), the mean over sub-tokens and layers of `logsumexp(logits)^2`.
    Arguments as above; a scalar tensor, float32.
    """
    device = router_logits[0].device
    squares = torch.stack([logits.to(device, torch.float32).logsumexp(dim=-1).square() for logits in router_logits])
    if attention_mask is None:
        return squares.mean()
    counted = attention_mask.reshape(-1).to(device, torch.float32)
    return (squares * counted).sum() / (counted.sum().clamp(min=1) * len(squares))
