"""How well a causal language model predicts tokens, as an `evaluate` module. It imports only what evaluate needs."""

import datasets
import evaluate
import numpy as np


_DESCRIPTION = """
Perplexity and token accuracy of a causal language model over the tokens of many sequences, from what the model says of
each: the likelihood of the true token, and the token it holds most likely. Nothing is loaded or downloaded.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[list[int]]`): for every sequence, the most likely token at each position.
    references (`list[list[int]]`): the true tokens of the same positions; where they are -100, nothing is counted.
    log_likelihoods (`list[list[float]]`): natural logarithm of the probability that the model gives each true token.
Returns:
    perplexity (`float`): exp of the cross entropy.
    cross_entropy (`float`): mean negative log likelihood of a counted token, in nats.
    token_accuracy (`float`): share of the counted tokens that were predicted, 0 to 1.
    tokens (`int`): how many were counted.
Examples:
    >>> token_quality = evaluate.load(PATH_OF_THIS_FOLDER)
    >>> token_quality.compute(
    ...     predictions=[[5, 7]], references=[[5, 9]], log_likelihoods=[[-0.5, -1.5]]
    ... )
    {'perplexity': 2.718281828459045, 'cross_entropy': 1.0, 'token_accuracy': 0.5, 'tokens': 2}
"""


class TokenQuality(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("int64")),
                    "references": datasets.Sequence(datasets.Value("int64")),
                    "log_likelihoods": datasets.Sequence(datasets.Value("float32")),
                }
            ),
        )

    # ty: ignore[incompatible-method-override]: each metric names its own inputs
    def _compute(self, predictions, references, log_likelihoods):
        predictions, references, log_likelihoods = (
            np.concatenate([np.asarray(row) for row in rows]) for rows in (predictions, references, log_likelihoods)
        )
        counted = references != -100
        if not counted.any():
            raise ValueError("references hold no token to count: every one of them is -100.")
        cross_entropy = -log_likelihoods[counted].mean(dtype=np.float64)
        return {
            "perplexity": float(np.exp(cross_entropy)),
            "cross_entropy": float(cross_entropy),
            "token_accuracy": float((predictions == references)[counted].mean()),
            "tokens": int(counted.sum()),
        }
