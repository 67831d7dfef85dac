"""What changes the loss inside a causal language model shares."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def changed_loss(model: nn.Module, change: Callable[[Callable], Callable]) -> Generator[None]:
    """Within it, the loss inside a causal language model, bare or inside PEFT's, is what `change` makes of its own."""
    causal_lm: Any = getattr(model, "get_base_model", lambda: model)()
    own = causal_lm.loss_function
    causal_lm.loss_function = change(own)
    try:
        yield
    finally:
        causal_lm.loss_function = own


def targets_of(
    labels: torch.Tensor,
    shift_labels: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | int]:
    """Labels (B, T) shifted as transformers' own loss does, which of them count, and what their sum is divided by."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
    shift_labels = shift_labels.to(device)
    counted = shift_labels.ne(-100)
    number = counted.sum() if num_items_in_batch is None else num_items_in_batch
    return shift_labels, counted, number.to(device) if isinstance(number, torch.Tensor) else number
