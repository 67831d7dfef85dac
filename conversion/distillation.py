"""Teaching one MH-MoE layer what a dense FFN does, on the FFN's inputs alone."""

import torch
from torch import nn


BATCH = 1024  # tokens
LEARNING_RATE = 1e-3
WARMUP = 10  # steps


def distil(
    block: nn.Module,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    steps: int,
    generator: torch.Generator,
) -> None:
    """
    Train `block` in place, with Adam, towards the least mean square of weights * (block(inputs) - targets).

    Args:
        block: maps (1, tokens, d) to the same shape.
        inputs: (N, d).
        targets: (N, d).
        weights: (N, 1), of the tokens.
        steps: each of `BATCH` tokens; the learning rate falls to zero over them.
        generator: chooses the tokens.
    """
    scale = (targets * weights).square().mean().rsqrt()
    optimizer = torch.optim.Adam(block.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP) * (1 - step / steps)
    )
    with torch.enable_grad():
        for _ in range(steps):
            batch = torch.randint(len(inputs), (min(BATCH, len(inputs)),), generator=generator)
            error = (block(inputs[batch][None])[0] - targets[batch]) * weights[batch] * scale
            optimizer.zero_grad()
            error.square().mean().backward()
            optimizer.step()
            schedule.step()
