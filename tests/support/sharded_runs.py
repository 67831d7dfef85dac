"""Runs of `mhmoe train` on two processes. Run by torchrun with a folder as its argument, it does them and leaves their
folders there. `model`, `train.jsonl`, `validation.txt` and `one`, a run on one process, are there before."""

import os
import shutil
import sys
from pathlib import Path

import torch
from accelerate_on_cpus import spread_over_cpus
from training_runs import options

from mhmoe.training.train_command import main


LAYOUTS = {
    "accelerate": {"fsdp": True},
    "accelerate-sharded": {"fsdp": True, "fsdp_config": '{"state_dict_type": "SHARDED_STATE_DICT"}'},
    "fsdp": {"distributed_config": '{"fsdp_size": 2}'},
    "tensor": {"distributed_config": '{"tp_size": 2}', "per_device_train_batch_size": 4},
    "expert": {"distributed_config": '{"fsdp_size": 2, "ep_size": 2}'},
}
# resumed from what another run had after half its steps, which may have been on one process
RESUMED = [
    ("one", "accelerate"),
    ("accelerate", "accelerate"),
    ("accelerate-sharded", "accelerate-sharded"),
    ("one", "tensor"),
    ("tensor", "expert"),
    ("expert", "fsdp"),
]
RUN = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2}


def train(output: str, fsdp: bool = False, **flags) -> None:
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # which accelerate set, in a run before this
    main(options(*["--fsdp"] * fsdp, output_dir=output, **RUN | flags))


def resume(source: str, output: str, **flags) -> None:
    """The rest of the run `source`, after half its steps."""
    if os.environ.get("RANK", "0") == "0":
        shutil.copytree(Path(source, "checkpoint-2"), Path(output, "checkpoint-2"))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    train(output, resume_from_checkpoint="true", **flags)


if __name__ == "__main__":
    spread_over_cpus()
    os.chdir(sys.argv[1])
    for layout, flags in LAYOUTS.items():
        train(layout, **flags)
    for source, layout in RESUMED:
        resume(source, f"{layout}-after-{source}", **LAYOUTS[layout])
