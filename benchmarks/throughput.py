"""
Tokens per second of a whole model, generating and training, against transformers' Mixtral of as many parameters and
FLOPs (P2: 96 experts of 512, 3 heads, 3 per sub-token, for 8 of 2048, 1 per token).

    python benchmarks/throughput.py --dtypes fp32 bf16 --layers 4

The models run in turns in one process. Writes throughput.json and throughput.png (plots.py) in the output
folder, and adds to what is there.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from plots import draw_throughput
from timing import DTYPES, alternate, machine, merge, positive
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from mhmoe import MHMoEConfig, MHMoEForCausalLM


KEYS = ("device", "threads", "task", "dtype", "layers", "batch", "model", "backend")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["generate", "train"], choices=["generate", "train"])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--backends", nargs="+", default=["subtoken", "grouped_mm"], help="for both models")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers, each with experts")
    parser.add_argument("--batch", type=int, default=1, help="rows")
    parser.add_argument("--prompt", type=int, default=32, help="tokens before the generated ones")
    parser.add_argument("--new", type=int, default=32, help="tokens to generate for each row")
    parser.add_argument("--train", type=int, default=512, help="tokens of a training row")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--budget", type=float, default=60, help="seconds for each task and dtype")
    parser.add_argument("--most", type=float, default=60, help="seconds that one run may take")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    for dtype in options.dtypes:
        models = make(options.layers, DTYPES[dtype], device)
        for task in options.tasks:
            rows = measure(models, task, options, device)
            point = {"task": task, "dtype": dtype, "layers": options.layers, "batch": options.batch}
            rows = [machine(device) | point | row for row in rows]
            draw_throughput(merge(options.output_dir / "throughput.json", rows, KEYS), options.output_dir)
            print(task, dtype, flush=True)
            for row in rows:
                speed = row.get("skipped") or f"{row['tokens_per_second']:9.1f} tokens/s, {row['runs']} runs"
                print(f"  {row['model']:8} {row['backend']:12} {row['parameters'] / 1e6:.0f} M  {speed}", flush=True)


def make(layers: int, dtype: torch.dtype, device: torch.device) -> dict[str, PreTrainedModel]:
    fields = {"vocab_size": 32000, "hidden_size": 768, "num_hidden_layers": layers, "num_attention_heads": 12}
    experts = {"num_experts": 96, "num_experts_per_tok": 3, "num_moe_heads": 3, "moe_intermediate_size": 512}
    mhmoe = MHMoEConfig(**fields, **experts)
    mixtral = MixtralConfig(
        **fields, intermediate_size=2048, num_local_experts=8, num_experts_per_tok=1, num_key_value_heads=12
    )
    torch.manual_seed(0)
    with torch.device(device):
        models = {"mhmoe": MHMoEForCausalLM(mhmoe), "mixtral": MixtralForCausalLM(mixtral)}
    for model in models.values():
        model.to(dtype)
        # generation runs on without an end, and is the same work for all
        model.generation_config.eos_token_id = None
    return models


def measure(models: dict[str, PreTrainedModel], task: str, options: argparse.Namespace, device: torch.device) -> list:
    length = options.prompt if task == "generate" else options.train
    ids = torch.randint(3, 32000, (options.batch, length), device=device)
    step = generate if task == "generate" else train
    functions = {
        f"{name} {backend}": step(model, backend, ids, options.new)
        for name, model in models.items()
        for backend in options.backends
    }
    times, skipped = alternate(functions, device, options.budget, options.most)
    tokens = options.batch * (options.new if task == "generate" else options.train)
    rows = []
    for key in functions:
        name, backend = key.split()
        row = {"model": name, "backend": backend, "parameters": models[name].num_parameters()}
        if key in skipped:
            rows.append(row | {"skipped": skipped[key]})
        else:
            seconds = statistics.median(times[key])
            rows.append(row | {"runs": len(times[key]), "seconds": seconds, "tokens_per_second": tokens / seconds})
    return rows


def generate(model: PreTrainedModel, backend: str, ids: torch.Tensor, new: int) -> Callable[[], None]:
    def function() -> None:
        model.set_experts_implementation(backend)
        model.eval().generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False
        )

    return function


def train(model: PreTrainedModel, backend: str, ids: torch.Tensor, _: int) -> Callable[[], None]:
    """Forward and backward of one row; the optimiser is the same for all."""

    def function() -> None:
        model.set_experts_implementation(backend)
        model.train()(input_ids=ids, labels=ids, output_router_logits=True).loss.backward()
        model.zero_grad(set_to_none=True)

    return function


if __name__ == "__main__":
    main()
