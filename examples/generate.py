"""
Generate with a model whose tensors are shared out among GPUs (tensor parallelism):

    torchrun --nproc_per_node 8 examples/generate.py MODEL "The capital of France is"

Transformers shares it out as it loads it, so no process ever holds the whole model. The numbers of attention heads and
of key-value heads have to divide by the number of processes. With --expert_parallel, each process has whole experts
instead of a part of every expert, and the number of experts has to divide too.
"""

import argparse
import os
import sys

import torch
from transformers import PreTrainedConfig
from transformers.distributed.configuration_utils import DistributedConfig

from mhmoe.errors import UserError
from mhmoe.loading import load_causal_lm, load_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or id on the Hub")
    parser.add_argument("prompt")
    parser.add_argument("--expert_parallel", action="store_true")
    parser.add_argument("--max_new_tokens", type=int, default=40)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    try:
        text = generate(**vars(options))
    except UserError as error:
        sys.exit(f"{parser.prog}: error: {error}")
    if int(os.environ.get("RANK", "0")) == 0:
        print(text)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def generate(model: str, prompt: str, expert_parallel: bool, max_new_tokens: int, dtype: str) -> str:
    """
    The prompt and what follows it, on every process.

    Raises:
        UserError: the model cannot be loaded, or cannot be shared out among so many processes.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    check_sizes(load_config(model), processes, expert_parallel)
    layout = DistributedConfig(tp_size=processes, ep_size=processes if expert_parallel else 1)
    loaded, tokenizer, _ = load_causal_lm(model, dtype=dtype, distributed_config=layout if processes > 1 else None)
    inputs = tokenizer(prompt, return_tensors="pt").to(loaded.device)
    tokens = loaded.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def check_sizes(config: PreTrainedConfig, processes: int, expert_parallel: bool) -> None:
    """A [`UserError`] where what each process would have is no whole number."""
    names = ["num_attention_heads", "num_key_value_heads"] if config.base_model_tp_plan else []  # BitNet has none
    names += ["num_routed_experts"] if expert_parallel else []
    sizes = {name: size for name in names if (size := getattr(config, name, None))}
    if uneven := [f"{name}={size}" for name, size in sizes.items() if size % processes]:
        most = max(n for n in range(1, processes) if not any(size % n for size in sizes.values()))
        raise UserError(f"{uneven[0]}: does not divide by {processes} processes; start {most} (--nproc_per_node)")


if __name__ == "__main__":
    main()
