"""One optimiser step of plain Trainer. Run by torchrun with a folder as its argument, it does the steps of
`TWO_PROCESSES` and saves there, for each, the weights it ended with."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import tiny_config, tiny_model
from transformers import MixtralForCausalLM, Trainer, TrainingArguments

from mhmoe import MHMoEForCausalLM


LEARNING_RATE = 0.1
AUX_LOSS = {"output_router_logits": True, "router_aux_loss_coef": 1.0}  # a weight at which a wrong share shows


class InTreeForCausalLM(MHMoEForCausalLM):
    """MH-MoE with the forward that transformers' own MoE models have, which adds the auxiliary loss as it is."""

    forward = MixtralForCausalLM.forward

    def __init__(self, config):
        super().__init__(config)
        self.num_experts, self.num_experts_per_tok = config.num_experts, config.num_experts_per_tok
        self.router_aux_loss_coef = config.router_aux_loss_coef


def random_rows(*ignored: int, tokens: int = 32) -> list[dict[str, torch.Tensor]]:
    """A row for each number in `ignored`, which is how many of its first labels are -100."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for count in ignored:
        input_ids = torch.randint(3, 128, (tokens,), generator=generator)
        labels = input_ids.clone()
        labels[:count] = -100
        rows.append({"input_ids": input_ids, "labels": labels})
    return rows


def sgd_arguments(output_dir: str, rows: int, micro_batches: int, **arguments) -> TrainingArguments:
    """Plain SGD over rows in order, on the CPU, `rows` of them in each micro-batch."""
    return TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=micro_batches,
        optim="sgd",
        train_sampling_strategy="sequential",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **arguments,
    )


FOUR, UNEQUAL = random_rows(0, 0, 0, 0), random_rows(0, 24, 8, 16)
TWO_PROCESSES = {  # rows are dealt to the processes micro-batch by micro-batch, in order
    "one micro-batch": {"rows": FOUR, "batch_size": 2},
    "two micro-batches": {"rows": [*FOUR[:2], *FOUR[:2]], "batch_size": 1, "accumulate": 2},
    "tokens counted by each process": {"rows": FOUR, "batch_size": 2, "average_tokens_across_devices": False},
    "unequal targets": {"rows": UNEQUAL, "batch_size": 2},
    "in-tree loss": {"rows": FOUR, "batch_size": 2, "in_tree_loss": True},
}


def start_model(in_tree_loss: bool = False) -> MHMoEForCausalLM:
    model = tiny_model(**AUX_LOSS)
    if in_tree_loss:
        weights, model = model.state_dict(), InTreeForCausalLM(tiny_config(**AUX_LOSS))
        model.load_state_dict(weights)
    return model


def one_step(
    rows: list[dict[str, torch.Tensor]],
    batch_size: int,
    accumulate: int = 1,
    in_tree_loss: bool = False,
    output_dir: str = "unused",
    **arguments,
) -> dict[str, torch.Tensor]:
    """Weights after one step of SGD over `rows` in order, `batch_size` of them in each micro-batch."""
    model = start_model(in_tree_loss)
    step = {"max_steps": 1, "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "max_grad_norm": 0}
    training_args = sgd_arguments(output_dir, batch_size, accumulate, **step, **arguments)
    Trainer(model=model, args=training_args, train_dataset=rows).train()
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for number, step in enumerate(TWO_PROCESSES.values()):
        weights = one_step(**step, output_dir=str(folder / "trainer"))
        if torch.distributed.get_rank() == 0:
            save_file(weights, folder / f"{number}.safetensors")
