"""
The MH-MoE layer and its load balancing loss from the papers' equations alone (P1 is arXiv 2404.15045, P2 is arXiv
2411.16205): one token, head and expert at a time, in float64, with nothing of the model's code. Differentiable.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def softmax(scores: list[Tensor]) -> list[Tensor]:
    highest = max(score.item() for score in scores)
    exponentials = [torch.exp(score - highest) for score in scores]
    return [exponential / sum(exponentials) for exponential in exponentials]


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return down @ (silu(gate @ x) * (up @ x))


def mhmoe_layer(
    tokens: Tensor,
    weights: Mapping[str, Tensor],
    num_moe_heads: int,
    num_experts_per_tok: int,
    norm_topk_prob: bool,
) -> tuple[Tensor, list[tuple[list[Tensor], list[int]]]]:
    """
    Args:
        tokens: `(l, d)`, float64.
        weights: float64 tensors: `gate` `(E, d/h)`; `expert_gate`, `expert_up` `(E, i, d/h)` and `expert_down`
            `(E, d/h, i)`; for h > 1 `head` and `merge` `(d, d)`; with a shared expert `shared_gate`, `shared_up`
            `(s, d)` and `shared_down` `(d, s)`.

    Returns:
        The layer's output `(l, d)`, and for each of the l * h sub-tokens, heads running fastest, the router's
        probabilities of all experts and the experts chosen.
    """
    num_experts, width = weights["gate"].shape
    outputs, routing = [], []
    for token in tokens:
        projected = weights["head"] @ token if num_moe_heads > 1 else token
        head_outputs = []
        for head in range(num_moe_heads):
            sub_token = projected[head * width : (head + 1) * width]
            probabilities = softmax([weights["gate"][expert] @ sub_token for expert in range(num_experts)])
            ranked = sorted(range(num_experts), key=lambda expert: probabilities[expert].item(), reverse=True)
            chosen = ranked[:num_experts_per_tok]
            routing.append((probabilities, chosen))
            total = sum(probabilities[expert] for expert in chosen) if norm_topk_prob else 1.0
            head_output = torch.zeros(width, dtype=tokens.dtype)
            for expert in chosen:
                expert_output = swiglu(
                    sub_token,
                    weights["expert_gate"][expert],
                    weights["expert_up"][expert],
                    weights["expert_down"][expert],
                )
                head_output = head_output + probabilities[expert] / total * expert_output
            head_outputs.append(head_output)
        output = torch.cat(head_outputs)
        if num_moe_heads > 1:
            output = weights["merge"] @ output
        if "shared_gate" in weights:
            output = output + swiglu(token, weights["shared_gate"], weights["shared_up"], weights["shared_down"])
        outputs.append(output)
    return torch.stack(outputs), routing


def load_balancing_loss(routing: list[tuple[list[Tensor], list[int]]]) -> Tensor:
    """P1 eq. 10, E / |X"| * sum_p t_p * mean gate_p, over the sub-tokens that `routing` holds."""
    num_experts = len(routing[0][0])
    loss = torch.zeros((), dtype=torch.float64)
    for expert in range(num_experts):
        routed = sum(expert in chosen for _, chosen in routing)
        mean_probability = sum(probabilities[expert] for probabilities, _ in routing) / len(routing)
        loss = loss + routed * mean_probability
    return num_experts / len(routing) * loss
