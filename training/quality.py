"""Perplexity and token accuracy for Trainer, without ever holding the logits of more than one batch."""

from pathlib import Path
from typing import Any

import evaluate
import torch
from torch.nn.functional import cross_entropy
from transformers import EvalPrediction


METRIC_FOLDER = Path(__file__).parent / "metrics" / "token_quality"


def token_predictions(
    logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Trainer's `preprocess_logits_for_metrics`: what the metric needs to know of a batch.

    Args:
        logits: (B, T, V), alone or first of what the model returned.
        labels: (B, T), which the model's predictions trail by one position; -100 where there is nothing to predict.

    Returns:
        (B, T - 1) twice, for every position but the first: the most likely token, the true one's log likelihood.
    """
    logits = logits if isinstance(logits, torch.Tensor) else logits[0]
    most_likely, log_likelihoods = [], []
    for row, targets in zip(logits[:, :-1], labels[:, 1:], strict=True):  # a float32 copy of them all would be large
        most_likely.append(row.argmax(dim=-1))
        log_likelihoods.append(-cross_entropy(row.float(), targets, reduction="none"))
    return torch.stack(most_likely), torch.stack(log_likelihoods)


class TokenQuality:
    """Trainer's `compute_metrics` for what [`token_predictions`] gives, by way of the `evaluate` module."""

    def __init__(self):
        self._metric = evaluate.load(str(METRIC_FOLDER), keep_in_memory=True)

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """The figures of all that was added; none yet where (with batch_eval_metrics) more is to come."""
        predictions: Any = prediction.predictions  # or tensors, where they come batch by batch
        labels: Any = prediction.label_ids
        most_likely, log_likelihoods = predictions
        self._metric.add_batch(predictions=most_likely, references=labels[:, 1:], log_likelihoods=log_likelihoods)
        return self._metric.compute() or {} if compute_result else {}
