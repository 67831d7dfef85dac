"""Label smoothing that keeps the losses of the routers."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import nn


@contextmanager
def smoothed_labels(model: nn.Module, factor: float) -> Generator[None]:
    """
    Within it, the cross entropy inside the loss of a causal language model is of labels smoothed by `factor`
    (arXiv 1512.00567, section 7): (1 - factor) of the target and factor of all tokens alike. Trainer's own label
    smoothing replaces the model's whole loss, and with it the losses of MH-MoE's routers.

    Args:
        model: a causal language model, bare or inside PEFT's.
        factor: from 0 to 1.
    """
    causal_lm: Any = getattr(model, "get_base_model", lambda: model)()
    cross_entropy = causal_lm.loss_function
    causal_lm.loss_function = _smooth(factor, cross_entropy)
    try:
        yield
    finally:
        causal_lm.loss_function = cross_entropy


@cache
def _smooth(factor: float, cross_entropy: Callable) -> Callable:
    return partial(_smoothed, factor, cross_entropy)  # ever the same object, for torch.compile


def _smoothed(
    factor: float,
    cross_entropy: Callable,
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """Logits (B, T, V), labels (B, T) -> scalar; shifted as transformers' own loss for causal language models does."""
    targets = {"num_items_in_batch": num_items_in_batch, "shift_labels": shift_labels}
    loss = cross_entropy(logits, labels, vocab_size, **targets, **kwargs)
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
    shift_labels = shift_labels.to(logits.device)
    counted = shift_labels.ne(-100)
    logits = logits.float()
    # -mean_v log p_v minus -log p_target: what all logits share cancels out
    differences = logits.gather(-1, shift_labels.clamp(min=0)[..., None]).squeeze(-1) - logits.mean(dim=-1)
    number = counted.sum() if num_items_in_batch is None else num_items_in_batch
    number = number.to(loss.device) if isinstance(number, torch.Tensor) else number
    return loss + factor * differences.masked_fill(~counted, 0.0).sum() / number
