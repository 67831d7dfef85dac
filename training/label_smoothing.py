"""Label smoothing that keeps the losses of the routers."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import nn

from .causal_loss import changed_loss, targets_of


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
    with changed_loss(model, partial(_smooth, factor)):
        yield


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
    shift_labels, counted, number = targets_of(labels, shift_labels, num_items_in_batch, logits.device)
    logits = logits.float()
    # -mean_v log p_v minus -log p_target: what all logits share cancels out
    differences = logits.gather(-1, shift_labels.clamp(min=0)[..., None]).squeeze(-1) - logits.mean(dim=-1)
    return loss + factor * differences.masked_fill(~counted, 0.0).sum() / number
