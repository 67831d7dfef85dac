"""Optimizer steps of a model with router biases. Run by torchrun with a folder as its argument, every process does one
step on its half of `ROWS` and saves there the biases it ended with."""

import sys
from pathlib import Path

import torch
from one_step import random_rows, sgd_arguments
from safetensors.torch import save_file
from tiny import tiny_model
from transformers import Trainer

from mhmoe import MHMoEForCausalLM
from mhmoe.training import MHMoETrainer, RouterBiasCallback


RATE = 0.01
ROWS = random_rows(0, 0, 0, 0, tokens=9)


def start_model() -> MHMoEForCausalLM:
    return tiny_model(router_bias_update_rate=RATE)


def biases_of(model: MHMoEForCausalLM) -> dict[str, torch.Tensor]:
    return {name: bias.clone() for name, bias in model.state_dict().items() if name.endswith("_correction_bias")}


def biases_after(steps: list[list[dict[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """What the biases are after steps whose weights do not move."""
    model = start_model().train()
    for rows in steps:
        model(torch.stack([row["input_ids"] for row in rows]))
        model.update_router_biases()
    return biases_of(model)


def trained_biases(
    rows: list[dict[str, torch.Tensor]], output_dir: str, batch_size: int, accumulate: int, plain: bool = False
) -> dict[str, torch.Tensor]:
    """What they are after one epoch with the Trainer, at a learning rate that moves nothing else."""
    model = start_model()
    epoch = {"num_train_epochs": 1, "learning_rate": 0.0, "gradient_checkpointing": True}
    training_args = sgd_arguments(output_dir, batch_size, accumulate, **epoch)
    if plain:
        trainer = Trainer(model, training_args, train_dataset=rows, callbacks=[RouterBiasCallback()])
    else:
        trainer = MHMoETrainer(model, training_args, train_dataset=rows)
    trainer.train()
    return biases_of(model)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    biases = trained_biases(ROWS, str(folder / "trainer"), batch_size=1, accumulate=2)
    save_file(biases, folder / f"{torch.distributed.get_rank()}.safetensors")
