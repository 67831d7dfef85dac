"""The bytes that a step with DeepSpeed's ZeRO-3 leaves on each of two processes. Run by torchrun with a model's folder
as its argument, it writes them beside it as JSON."""

import json
import sys
from pathlib import Path

import deepspeed
import torch
from layout_bytes import local_bytes
from torch import distributed
from transformers import AutoModelForCausalLM

import mhmoe  # noqa: F401, which registers the Auto classes


if __name__ == "__main__":
    deepspeed.init_distributed("gloo")
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    config["zero_allow_untested_optimizer"] = True
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, zero, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    ids = torch.arange(3, 67).view(2, 32)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    moments = [value for state in zero.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    parts = [parameter.ds_tensor for parameter in model.parameters()]
    found = {
        "weights": local_bytes(parts) + local_bytes(zero.fp32_partitioned_groups_flat),
        "gradients": local_bytes([zero.grad_partitions_flat_buffer]),
        "optimizer": local_bytes([moment for moment in moments if moment.ndim]),
    }
    every = [None, None]
    distributed.all_gather_object(every, found)
    if distributed.get_rank() == 0:
        Path(sys.argv[1] + ".json").write_text(json.dumps(every))
