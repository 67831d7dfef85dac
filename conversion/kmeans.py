"""Router rows from text: each is for a cluster of sub-tokens, so that experts start with inputs of their own kind."""

import torch


ROUNDS = 20
BALANCING_ROUNDS = 50
MOST_POINTS = 256  # per cluster; more change little


def router_rows(sub_tokens: torch.Tensor, experts: int, top_k: int, generator: torch.Generator) -> torch.Tensor:
    """
    Rows of a router, from spherical k-means over sub-tokens, whose lengths even out the experts' loads.

    Args:
        sub_tokens: (S, n), what the router is to see.
        experts: E, the number of rows.
        top_k: how many experts a sub-token is routed to; the loads of these are balanced.
        generator: of the start.

    Returns:
        (E, n), of mean zero over the experts, which no choice of experts depends on, and of mean length about one.
    """
    chosen = torch.randperm(len(sub_tokens), generator=generator)[: MOST_POINTS * experts]
    points = sub_tokens[chosen].float()
    # what all sub-tokens share would only make some experts everybody's choice, as a router has no bias
    common = torch.nn.functional.normalize(points.mean(dim=0), dim=0)
    points = torch.nn.functional.normalize(points - points @ common[:, None] * common, dim=1)
    centres = _spread_out(points, experts, generator)
    for _ in range(ROUNDS):
        nearest = (points @ centres.T).argmax(dim=1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        empty = sums.norm(dim=1) < 1e-6
        sums[empty] = points[torch.randint(len(points), (int(empty.sum()),), generator=generator)]
        centres = torch.nn.functional.normalize(sums, dim=1)
    # no two rows alike and none zero, even where sub-tokens are
    noise = torch.randn(centres.shape, generator=generator)
    centres += 0.01 * torch.nn.functional.normalize(noise - noise @ common[:, None] * common, dim=1)

    length = torch.ones(experts)
    for step in range(BALANCING_ROUNDS):
        picked = (points @ (centres * length[:, None]).T).topk(top_k, dim=1).indices
        load = torch.bincount(picked.flatten(), minlength=experts) * experts / picked.numel()
        length *= (1 - 0.5 * (1 - step / BALANCING_ROUNDS) * (load - 1).clamp(-0.5, 0.5)).to(length)
        length.clamp_(0.25, 4)
    rows = centres * (length / length.mean())[:, None]
    return rows - rows.mean(dim=0)


def _spread_out(points: torch.Tensor, number: int, generator: torch.Generator) -> torch.Tensor:
    """Points to start from, each drawn the likelier the farther it is from those before (k-means++)."""
    chosen = [torch.randint(len(points), (), generator=generator)]
    distance = torch.full((len(points),), 2.0)
    while len(chosen) < number:
        distance = distance.minimum(1 - points @ points[chosen[-1]]).clamp(min=1e-6)
        chosen.append(distance.multinomial(1, generator=generator)[0])
    return points[torch.stack(chosen)]
