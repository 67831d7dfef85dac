"""The load balancing loss of MH-MoE. This file travels to the Hub: it imports only torch."""

import torch
from torch import distributed


def load_balancing_loss(
    router_logits: tuple[torch.Tensor, ...],
    num_experts_per_tok: int,
    num_moe_heads: int,
    attention_mask: torch.Tensor | None = None,
    over_processes: bool = False,
) -> torch.Tensor:
    """
    P1 eq. 10 over sub-tokens, pooled over the layers as transformers' MoE models pool theirs:
    `E * sum_p (share of sub-tokens routed to p) * (mean router probability of p)`, which is k for a perfect balance.

    Args:
        router_logits: for every MH-MoE layer, `(batch * tokens * num_moe_heads, num_experts)`.
        num_experts_per_tok: experts that each sub-token is routed to, k.
        num_moe_heads: sub-tokens of a token, h.
        attention_mask: `(batch, tokens)`, 0 at padding, whose h sub-tokens then do not count.
        over_processes: take the share of sub-tokens over all processes of a data-parallel step. With it the mean of
            the processes' losses has the gradient that one process would find on the whole batch; without it each
            process balances its own part.

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
    for logits in router_logits:
        probabilities = logits.to(device).softmax(dim=-1, dtype=torch.float32)  # (B * T * h, E)
        chosen = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(num_experts_per_tok).indices, 1.0)
        if attention_mask is not None:
            probabilities, chosen = probabilities * counted, chosen * counted
        routed = routed + chosen.sum(dim=0)
        probability = probability + probabilities.sum(dim=0)
        rows = rows + (counted.sum() if attention_mask is not None else len(logits))

    totals = torch.cat([routed, rows[None]])  # a copy, since autograd keeps `rows`
    if over_processes:
        distributed.all_reduce(totals)
    return num_experts * (totals[:-1] / totals[-1] * probability / rows).sum()
