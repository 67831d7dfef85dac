"""What a pre-training run leaves in `pretraining.json`."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from mhmoe.files import write_json


REPORT = "pretraining.json"


# of a finished run, what a comparison reads
NUMBERS = ("seed", "parameters", "ffn_parameters", "ffn_multiply_adds", "validation_tokens")


def is_finished(report: dict[str, Any]) -> bool:
    """Whether what a file holds is the report of a run that came to its end."""
    curve, texts = report.get("curve"), report.get("texts")
    return (
        report.get("finished") is True
        and isinstance(report.get("model"), str)
        and isinstance(report.get("tokens_per_second"), int | float | None)
        and _are_numbers(report, NUMBERS)
        and isinstance(curve, list)
        and bool(curve)
        and all(isinstance(point, dict) and _are_numbers(point, ("tokens", "perplexity")) for point in curve)
        and isinstance(texts, dict)
        and _are_numbers(texts, texts)
    )


def _are_numbers(values: dict[str, Any], names: Iterable[str]) -> bool:
    return all(isinstance(values.get(name), int | float) for name in names)


class Report(TrainerCallback):
    """
    Keeps `file` at what is known of a run: its costs, tokens a second of training (of the last session where it was
    resumed, without its first step) and the curve, `perplexity` on all validation text after `tokens`; at the end also
    the perplexity on each of several texts.
    """

    def __init__(self, file: Path, figures: dict):
        self.file = file
        self.figures: dict[str, Any] = {
            **figures,
            "tokens_per_second": None,
            "curve": [],
            "texts": {},
            "finished": False,
        }
        self._steps, self._seconds, self._started = 0, 0.0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._read_curve(state)  # of a run that is resumed at its last step there is no evaluation any more

    def on_step_begin(self, args, state, control, **kwargs):
        self._started = self._now()

    def on_step_end(self, args, state, control, **kwargs):
        self._steps += 1
        if self._steps > 1:  # the first one warms up
            self._seconds += self._now() - self._started

    def on_evaluate(self, args, state, control, **kwargs):
        self._read_curve(state)
        if self._seconds:
            self.figures["tokens_per_second"] = (self._steps - 1) * self.figures["tokens_per_step"] / self._seconds
        if state.is_world_process_zero:
            self.write()

    def _read_curve(self, state) -> None:
        self.figures["curve"] = [
            {"tokens": entry["step"] * self.figures["tokens_per_step"], "perplexity": entry["eval_perplexity"]}
            for entry in state.log_history
            if "eval_perplexity" in entry
        ]

    def write(self, finished: bool = False) -> None:
        self.figures["finished"] = finished
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.file, self.figures)

    @staticmethod
    def _now() -> float:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter()
