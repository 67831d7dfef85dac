"""One optimiser step of plain Trainer. Run by torchrun with a folder as its argument, it does the steps of
`TWO_PROCESSES` and saves there, for each, the model that it ends with."""

import os
import sys
from pathlib import Path

import torch
from accelerate_on_cpus import spread_over_cpus
from tiny import tiny_config, tiny_model
from transformers import MixtralForCausalLM, Trainer, TrainingArguments
from transformers.distributed.configuration_utils import DistributedConfig

from mhmoe import MHMoEForCausalLM
from mhmoe.training import RouterBiasCallback


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
LAYOUTS = {  # how a model lies on two processes
    "copies": {},
    "copies, all used": {"ddp_find_unused_parameters": False},
    "accelerate's FSDP2": {"fsdp": True},
    "FSDP2": {"distributed_config": {"fsdp_size": 2}},
    "tensor": {"distributed_config": {"tp_size": 2}},
    "tensor and expert": {"distributed_config": {"tp_size": 2, "ep_size": 2}},
    "data and expert": {"distributed_config": {"fsdp_size": 2, "ep_size": 2}},
}
# rows are dealt to the processes micro-batch by micro-batch, in order
STEPS = {
    "two micro-batches": {"rows": [*FOUR[:2], *FOUR[:2]], "batch_size": 1, "accumulate": 2},
    "unequal targets": {"rows": UNEQUAL, "batch_size": 2},
    "unused experts": {"rows": FOUR, "batch_size": 2, "start": "unused experts"},
    "router biases": {"rows": FOUR, "batch_size": 2, "start": "router biases"},
}
TWO_PROCESSES = {
    ("copies", "one micro-batch"): {"rows": FOUR, "batch_size": 2},
    ("copies", "tokens counted by each process"): {
        "rows": FOUR,
        "batch_size": 2,
        "average_tokens_across_devices": False,
    },
    ("copies", "in-tree loss"): {"rows": FOUR, "batch_size": 2, "start": "in-tree loss"},
    **{(layout, step): STEPS[step] | LAYOUTS[layout] for layout in LAYOUTS for step in STEPS},
    # one of the processes has these, and nothing to do
    **{
        ("data and expert", f"unused experts, {implementation}"): STEPS["unused experts"]
        | LAYOUTS["data and expert"]
        | {"experts_implementation": implementation}
        for implementation in ("eager", "grouped_mm", "batched_mm")
    },
}


def start_model(start: str = "plain") -> MHMoEForCausalLM:
    """ "unused experts": the second half of the experts gets no sub-token."""
    if start == "router biases":
        return tiny_model(**AUX_LOSS, router_bias_update_rate=0.01, router_z_loss_coef=0.1)
    model = tiny_model(**AUX_LOSS, num_experts=8 if start == "unused experts" else 6)
    if start == "in-tree loss":
        weights, model = model.state_dict(), InTreeForCausalLM(tiny_config(**AUX_LOSS))
        model.load_state_dict(weights)
    elif start == "unused experts":
        with torch.no_grad():
            for layer in model.model.layers:
                first, second, *_ = layer.mlp.gate.weight.clone()
                # wherever a sub-token is, two of these four logits are above zero
                layer.mlp.gate.weight.copy_(torch.stack([first, -first, second, -second, *[0 * first] * 4]))
    return model


def one_step(
    rows: list[dict[str, torch.Tensor]],
    batch_size: int,
    accumulate: int = 1,
    start: str = "plain",
    distributed_config: dict | None = None,
    experts_implementation: str | None = None,
    output_dir: str = "unused",
    **arguments,
) -> Trainer:
    """
    Trainer after one step of SGD over `rows` in order, `batch_size` of them in each micro-batch of a process, or of
    two that share each row.
    """
    if distributed_config is not None:
        batch_size *= distributed_config.get("tp_size", 1)
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # which accelerate set, in a step before this
    step = {"max_steps": 1, "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "max_grad_norm": 0}
    training_args = sgd_arguments(output_dir, batch_size, accumulate, **step, **arguments)
    model = start_model(start)
    if distributed_config is not None:
        if training_args.process_index == 0:
            model.save_pretrained(Path(output_dir, start))
        torch.distributed.barrier()
        model = MHMoEForCausalLM.from_pretrained(
            Path(output_dir, start), distributed_config=DistributedConfig(**distributed_config)
        )
    if experts_implementation is not None:
        model.set_experts_implementation(experts_implementation)
    callbacks = [RouterBiasCallback()] if start == "router biases" else None
    trainer = Trainer(model=model, args=training_args, train_dataset=rows, callbacks=callbacks)
    trainer.train()
    return trainer


def weights_after(*args, **kwargs) -> dict[str, torch.Tensor]:
    """Of the model after [`one_step`] in this process."""
    return {name: weight.detach().clone() for name, weight in one_step(*args, **kwargs).model.state_dict().items()}


if __name__ == "__main__":
    spread_over_cpus()
    folder = Path(sys.argv[1])
    for number, step in enumerate(TWO_PROCESSES.values()):
        one_step(**step, output_dir=str(folder / "trainer")).save_model(str(folder / str(number)))
