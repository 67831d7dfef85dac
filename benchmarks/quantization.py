"""
What does an MH-MoE model weigh, and how well does it predict, when its weights are quantized?

    python benchmarks/quantization.py MODEL --text books.jsonl --output benchmarks/results/quantization.json

Loads MODEL with each `quantization_config`, counts the bytes of its parameters and buffers, and of its experts alone,
and measures perplexity on the first tokens of the text (JSON lines with a field "text"), in rows of 512. Prints a
table, and writes it as JSON.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from torch import nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from mhmoe.modeling_mhmoe.experts import SubTokenExperts
from mhmoe.text import open_text


# whose 1,248 inputs in an anchored conversion of SmolLM2 are no whole blocks of 64, as bitsandbytes wants on a CPU
SKIPPED = ["lm_head", "shared_expert.down_proj"]
CONFIGS = {
    "none (float32)": None,
    "torchao int8": TorchAoConfig(Int8WeightOnlyConfig()),
    "torchao float8": TorchAoConfig(Float8WeightOnlyConfig()),
    "bitsandbytes 8 bit": BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes nf4": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=SKIPPED
    ),
    "bitsandbytes fp4": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", llm_int8_skip_modules=SKIPPED
    ),
    "quanto int8 (experts in float32)": QuantoConfig("int8"),
}
ROW = 512


def nbytes(tensor: torch.Tensor) -> int:
    """Of what a tensor is made of, too: `Tensor.nbytes` of a quantized one is that of the dtype it stands for."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(nbytes(getattr(tensor, name)) for name in names)
    state = getattr(tensor, "quant_state", None)  # of bitsandbytes' linear layers in 4 bits
    scales = 0 if state is None else nbytes(state.absmax)
    return tensor.numel() * tensor.element_size() + scales


def weight(*modules: nn.Module) -> int:
    tensors = {id(tensor): tensor for module in modules for tensor in (*module.parameters(), *module.buffers())}
    return sum(map(nbytes, tensors.values()))


@torch.inference_mode()
def perplexity(model: nn.Module, rows: torch.Tensor) -> float:
    losses = [model(row[None], labels=row[None]).loss.item() for row in rows]
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--only", nargs="+", choices=CONFIGS, default=list(CONFIGS), metavar="NAME")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with open_text(options.text) as lines:
        text = "\n\n".join(json.loads(line)["text"] for line, _ in zip(lines, range(100), strict=False))
    ids = AutoTokenizer.from_pretrained(options.model)(text[: 8 * options.tokens], return_tensors="pt").input_ids[0]
    rows = ids[: options.tokens // ROW * ROW].view(-1, ROW)
    results = {}
    print(f"| quantization | MB | of experts, MB | perplexity ({rows.numel():,} tokens) |\n|---|---:|---:|---:|")
    for name in options.only:
        model = AutoModelForCausalLM.from_pretrained(
            options.model, quantization_config=CONFIGS[name], dtype=torch.float32
        )
        experts = [module for module in model.modules() if isinstance(module, SubTokenExperts)]
        results[name] = {
            "bytes": weight(model),
            "experts_bytes": weight(*experts),
            "perplexity": perplexity(model.eval(), rows),
        }
        whole, part, value = results[name].values()
        print(f"| {name} | {whole / 1e6:.1f} | {part / 1e6:.1f} | {value:.2f} |", flush=True)
    if options.output:
        options.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
