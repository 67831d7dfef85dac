"""Run by torchrun with a file as its argument: what RoutingCallback logs of `ROWS`, shared by the processes."""

import json
import sys
from pathlib import Path

import torch
from one_step import random_rows, sgd_arguments
from tiny import tiny_model
from transformers import Trainer

from mhmoe.training import RoutingCallback


def padded_rows() -> list[dict[str, torch.Tensor]]:
    """Four rows of 32 tokens with 0, 24, 8 and 16 of them padding, whose ids are of real tokens."""
    rows = random_rows(0, 24, 8, 16)
    return [{**row, "attention_mask": row["labels"].ne(-100).long()} for row in rows]


def routing_logs(model: torch.nn.Module, output_dir: str, **arguments) -> list[dict[str, float]]:
    """Trainer's logs of losses, two steps of two rows for each process in all, and the weights stay."""
    given = {"max_steps": 2, "learning_rate": 0.0, "logging_steps": 1, **arguments}
    rows = given.pop("rows", padded_rows())
    training_args = sgd_arguments(output_dir, given.pop("batch_size", 2), given.pop("accumulate", 1), **given)
    trainer = Trainer(
        model=model, args=training_args, train_dataset=rows, eval_dataset=rows[:1], callbacks=[RoutingCallback()]
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    logs = routing_logs(tiny_model(num_experts=24), "unused", batch_size=1, rows=padded_rows())
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(logs))
