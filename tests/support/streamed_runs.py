"""Runs of `mhmoe train --streaming` on two processes, launched by torchrun where `one`, a run on one process, is."""

import os
import shutil
from pathlib import Path

import torch
from accelerate_on_cpus import spread_over_cpus
from training_runs import options

from mhmoe.training import streaming
from mhmoe.training.train_command import main


LAYOUTS = {
    "copies": {},
    "fsdp": {"distributed_config": '{"fsdp_size": 2}'},
    "tensor": {"distributed_config": '{"tp_size": 2}', "per_device_train_batch_size": 4},
    "each-reads": {"accelerator_config": '{"dispatch_batches": false}'},
}
RUN = {"block_size": 16, "shuffle_buffer_size": 30, "max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 2}


def train(output: str, **flags) -> None:
    main(["model", "--train_file", "train.jsonl", "more.jsonl", "--streaming", *given(output, **flags)])


def given(output: str, **flags) -> list[str]:
    return options(train_file=None, output_dir=output, **RUN | flags)[1:]


if __name__ == "__main__":
    spread_over_cpus()
    streaming.CHARACTERS = 100
    for layout, flags in LAYOUTS.items():
        train(layout, **flags)
        resumed = f"{layout}-after-one"
        if os.environ["RANK"] == "0":
            shutil.copytree(Path("one", "checkpoint-2"), Path(resumed, "checkpoint-2"))
        torch.distributed.barrier()
        train(resumed, resume_from_checkpoint="true", **flags)
