"""
Generate with a model whose tensors are shared out among GPUs (tensor parallelism):

    torchrun --nproc_per_node 8 examples/generate.py MODEL "The capital of France is"

Transformers shares it out as it loads it, so no process ever holds the whole model. Attention and key-value heads, and
the experts' inner size, have to divide by the number of processes. With --expert_parallel, each process has whole
experts instead of a part of every expert.
"""

import argparse
import os

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed.configuration_utils import DistributedConfig

import mhmoe  # noqa: F401, which makes MH-MoE known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or id on the Hub")
    parser.add_argument("prompt")
    parser.add_argument("--expert_parallel", action="store_true")
    parser.add_argument("--max_new_tokens", type=int, default=40)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    layout = {"tp_size": processes, "ep_size": processes if options.expert_parallel else 1}
    model = AutoModelForCausalLM.from_pretrained(
        options.model,
        dtype=options.dtype,
        distributed_config=DistributedConfig(**layout) if processes > 1 else None,
    )
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    inputs = tokenizer(options.prompt, return_tensors="pt").to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=options.max_new_tokens, do_sample=False)
    if int(os.environ.get("RANK", "0")) == 0:
        print(tokenizer.decode(tokens[0], skip_special_tokens=True))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
