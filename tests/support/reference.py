"""
The MH-MoE layer, its variants and its losses from the papers' equations alone (P1 is arXiv 2404.15045, P2 is arXiv
2411.16205): one token, head and expert at a time, in float64, with nothing of the model's code. Differentiable.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


Layers = list[tuple[Tensor, Tensor | None]]  # weight and bias of linear layers, the first to be applied first
Routing = list[tuple[list[Tensor], list[int]]]  # for every sub-token the probabilities of all experts, those chosen


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def relu(x: Tensor) -> Tensor:
    return x * (x > 0)


def softmax(scores: list[Tensor]) -> list[Tensor]:
    highest = max(score.item() for score in scores)
    exponentials = [torch.exp(score - highest) for score in scores]
    return [exponential / sum(exponentials) for exponential in exponentials]


def sigmoid(scores: list[Tensor]) -> list[Tensor]:
    return [torch.exp(log_sigmoid(score)) for score in scores]


def log_sigmoid(score: Tensor) -> Tensor:
    return torch.clamp(score, max=0) - torch.log1p(torch.exp(-score.abs()))


def shares(scores: list[Tensor], scoring: Callable) -> list[Tensor]:
    """Gates over their sum, by their logarithms: sigmoids may all be too small for a number."""
    return softmax([log_sigmoid(score) for score in scores] if scoring is sigmoid else scores)


def product(weight: Tensor, x: Tensor) -> Tensor:
    return weight @ x


def bitnet_product(weight: Tensor, x: Tensor) -> Tensor:
    """BitNet b1.58: ternary weight (absmean) times 8-bit x (absmax); gradients pass the rounding as if it was none."""
    mean = weight.detach().abs().mean()
    ternary = torch.where(weight / mean > 0.5, 1.0, torch.where(weight / mean < -0.5, -1.0, 0.0)) * mean
    step = x.detach().abs().max() / 127
    steps = x.detach() / step
    # sums of ternary times 8-bit numbers often lie between two steps, where float32 may round otherwise
    assert ((steps % 1 - 0.5).abs() > 1e-4).all(), "a tie: compare another case"
    eight_bit = torch.round(steps) * step
    return (weight + (ternary - weight).detach()) @ (x + (eight_bit - x).detach())


def ffn(x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, act: Callable, product: Callable) -> Tensor:
    """P2's gated FFN, or with no gate P1's."""
    inner = act(product(up, x)) if gate is None else act(product(gate, x)) * product(up, x)
    return product(down, inner)


def linear_layers(x: Tensor, layers: Layers, product: Callable) -> Tensor:
    for number, (weight, bias) in enumerate(layers):
        x = product(weight, relu(x) if number else x)
        x = x if bias is None else x + bias
    return x


def convolution(x: Tensor, kernels: Tensor, biases: Tensor | None, stride: int, width: int) -> Tensor:
    """`width` numbers for each kernel in turn; it sees zeros around x, as many as it is longer than the stride."""
    heads, kernel_size = kernels.shape
    before = max(kernel_size - stride, 0) // 2
    numbers = []
    for head in range(heads):
        for position in range(width):
            seen = [(tap, position * stride + tap - before) for tap in range(kernel_size)]
            terms = [kernels[head, tap] * x[index] for tap, index in seen if 0 <= index < len(x)]
            numbers.append(sum(terms) + (0 if biases is None else biases[head]))
    return torch.stack(numbers)


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum() / ((x * x).sum().sqrt() * (y * y).sum().sqrt())


def softmax_router_logits(sub_token: Tensor, router: Mapping) -> list[Tensor]:
    """P1 eq. 4: the sub-token's product with every expert's `weight` `(E, d/h)`."""
    return [row @ sub_token for row in router["weight"]]


def xmoe_router_logits(sub_token: Tensor, router: Mapping) -> list[Tensor]:
    """X-MoE: cosines of the sub-token behind `projection` `(r, d/h)` and `weight` `(E, r)`, over `temperature`."""
    query = router["projection"] @ sub_token
    return [cosine(query, embedding) / router["temperature"] for embedding in router["weight"]]


ROUTER_LOGITS = {"softmax": softmax_router_logits, "xmoe": xmoe_router_logits}  # by `router_type`


def mhmoe_layer(
    tokens: Tensor,
    weights: Mapping,
    num_moe_heads: int,
    num_experts_per_tok: int,
    norm_topk_prob: bool,
    *,
    router_logits: Callable = softmax_router_logits,
    act: Callable = silu,
    scoring: Callable = softmax,
    residual: bool = False,
    product: Callable = product,
    private: bool = False,
    router_input: str = "sub_token",
) -> tuple[Tensor, Routing]:
    """
    Args:
        tokens: `(l, d)`, float64.
        weights: float64 tensors: `router`, those that `router_logits` takes; `expert_gate`, `expert_up`
            `(E, i, d/h)` and `expert_down` `(E, d/h, i)`; `head` and `merge`, lists of layers `(d, d)`, the first and
            the last of which may be to and from a latent size; with a shared expert `shared_gate`, `shared_up`
            `(s, d)` and `shared_down` `(d, s)`. Without gates there is no `..._gate`. `kernels` `(h, K)`,
            `kernel_biases` and the number `stride` replace `head`. `selection_bias` `(E,)` is added to the scores to
            choose by.
        private: whether there are as many experts, and rows of the router, for each head, head after head; the
            router's logits and those chosen are then of the head's own.
        router_input: what the router sees: "sub_token", "latent" (all sub-tokens) or "token"; if not the first, it has
            rows for each head.

    Returns:
        The layer's output `(l, d)`, and for each of the l * h sub-tokens, heads running fastest, the scores of all
        experts, divided by their sum, and the experts chosen.
    """
    num_experts = len(weights["expert_up"]) // (num_moe_heads if private else 1)
    outputs, routing = [], []
    for token in tokens:
        width = len(token) // num_moe_heads
        if "kernels" in weights:
            kernels = (weights["kernels"], weights["kernel_biases"], weights["stride"])
            projected = convolution(token, *kernels, width)
        else:
            projected = linear_layers(token, weights["head"], product)
        head_outputs = []
        width = len(projected) // num_moe_heads
        for head in range(num_moe_heads):
            sub_token = projected[head * width : (head + 1) * width]
            own = slice(head * num_experts, (head + 1) * num_experts)
            router = weights["router"]
            if private or router_input != "sub_token":
                router = {**router, "weight": router["weight"][own]}
            seen = {"sub_token": sub_token, "latent": projected, "token": token}[router_input]
            logits = router_logits(seen, router)
            scores = scoring(logits)
            bias = weights.get("selection_bias", torch.zeros(num_experts * num_moe_heads))
            bias = bias[own] if private else bias
            ranks = [(scores[expert] + bias[expert]).item() for expert in range(num_experts)]
            chosen = sorted(range(num_experts), key=ranks.__getitem__, reverse=True)[:num_experts_per_tok]
            routing.append((shares(logits, scoring), chosen))
            chosen_scores = [scores[expert] for expert in chosen]
            if norm_topk_prob:
                chosen_scores = shares([logits[expert] for expert in chosen], scoring)
            head_output = sub_token if residual else torch.zeros(width, dtype=tokens.dtype)
            for score, number in zip(chosen_scores, chosen, strict=True):
                expert = own.start + number if private else number
                expert_output = ffn(
                    sub_token,
                    weights["expert_gate"][expert] if "expert_gate" in weights else None,
                    weights["expert_up"][expert],
                    weights["expert_down"][expert],
                    act,
                    product,
                )
                head_output = head_output + score * expert_output
            head_outputs.append(head_output)
        output = linear_layers(torch.cat(head_outputs), weights["merge"], product)
        if "shared_up" in weights:
            shared = (weights.get("shared_gate"), weights["shared_up"], weights["shared_down"])
            output = output + ffn(token, *shared, act, product)
        outputs.append(output)
    return torch.stack(outputs), routing


def load_balancing_loss(routing: Routing) -> Tensor:
    """P1 eq. 10, E / |X"| * sum_p t_p * mean gate_p, over the sub-tokens that `routing` holds."""
    num_experts = len(routing[0][0])
    loss = torch.zeros((), dtype=torch.float64)
    for expert in range(num_experts):
        routed = sum(expert in chosen for _, chosen in routing)
        mean_probability = sum(probabilities[expert] for probabilities, _ in routing) / len(routing)
        loss = loss + routed * mean_probability
    return num_experts / len(routing) * loss


def z_loss(logits: list[list[Tensor]]) -> Tensor:
    """ST-MoE eq. 5 (arXiv 2202.08906): mean over sub-tokens of (log sum_p exp(logit_p))^2."""
    return sum(torch.log(sum(torch.exp(logit) for logit in row)) ** 2 for row in logits) / len(logits)
