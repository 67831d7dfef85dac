"""The bytes that training leaves on each of two processes. Run by torchrun with a folder as its argument, it writes
them there as JSON, by layout and model; the models are in the folder before."""

import json
import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

import mhmoe  # noqa: F401, which registers the Auto classes


LAYOUTS = {
    "DDP": None,
    "FSDP2": {"fsdp_size": 2},
    "FSDP2 + EP 2": {"fsdp_size": 2, "ep_size": 2},
    "TP 2": {"tp_size": 2},
}


def local_bytes(tensors) -> int:
    found = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in found)


def states_after_a_step(model: nn.Module) -> dict[str, int]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.arange(3, 67).view(2, 32) + distributed.get_rank()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    return {
        "weights": local_bytes(model.parameters()),
        "gradients": local_bytes(parameter.grad for parameter in model.parameters()),
        "optimizer": local_bytes(moments),
    }


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    folder, measured = Path(sys.argv[1]), {}
    for layout, fields in LAYOUTS.items():
        for path in sorted(folder.iterdir()):
            if path.name == "dense" and "EP" in layout:
                continue
            options = {} if fields is None else {"distributed_config": DistributedConfig(**fields)}
            model = AutoModelForCausalLM.from_pretrained(path, **options)
            model = DistributedDataParallel(model, find_unused_parameters=True) if fields is None else model
            if layout.startswith("TP"):
                found = {"weights": local_bytes(model.parameters())}
            else:
                found = states_after_a_step(model)
            every = [None, None]
            distributed.all_gather_object(every, found)
            measured[f"{layout} {path.name}"] = every
    if distributed.get_rank() == 0:
        Path(sys.argv[1] + ".json").write_text(json.dumps(measured))
    distributed.destroy_process_group()
