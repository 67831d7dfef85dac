"""
How long do the layers of the papers after P2 take, beside P2's own and a dense SwiGLU of the same FLOPs?

    python benchmarks/family.py

P2's layer of 3 heads at its size (d = 768, 96 experts), the same with private experts (32 for each head), with a
router of whole tokens, and with a latent size of half of d, whose inner size and experts are solved for the same FLOPs
and parameters. All run in turns in one process, forward and backward; a ratio is to the dense run of the same turn.
Prints a table of medians.
"""

import argparse

import torch
from experts import step
from timing import DTYPES, alternate, machine, positive, summary
from torch import nn

from mhmoe import MHMoEConfig
from mhmoe.configuration import costs
from mhmoe.modeling_mhmoe.experts import MHMoEMLP
from mhmoe.modeling_mhmoe.modeling_mhmoe import MHMoESparseMoeBlock


LAYERS = {
    "P2, 3 heads": {},
    "private experts": {"private_experts": True, "num_experts": 32},
    "router of tokens": {"router_input": "token"},
    # 3 d ff = 2 d l + 3 l k i
    "latent of d/2": {"moe_latent_size": 384, "moe_intermediate_size": 1192, "num_experts": 80},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 64, 2048])
    parser.add_argument("--dtypes", nargs="+", default=["fp32"], choices=list(DTYPES))
    parser.add_argument("--backends", nargs="+", default=["subtoken", "grouped_mm"])
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--budget", type=float, default=15, help="seconds for each number of tokens and mode")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine(torch.device("cpu")), "\n")
    for dtype in options.dtypes:
        dense, blocks = make(DTYPES[dtype])
        for tokens in options.tokens:
            for backward in (False, True):
                measure(dense, blocks, torch.randn(1, tokens, 768, dtype=DTYPES[dtype]), backward, options)


def make(dtype: torch.dtype) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The dense layer and the others, freshly drawn."""
    configs = {
        name: MHMoEConfig.from_preset("p2-mhmoe-head3", num_hidden_layers=1, decoder_sparse_step=1, **fields)
        for name, fields in LAYERS.items()
    }
    parts = {name: MHMoESparseMoeBlock(config) for name, config in configs.items()}
    dense = MHMoEMLP(next(iter(configs.values())), 2048)
    for module in (dense, *parts.values()):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    for name, config in configs.items():
        counted = costs(config)
        print(f"{name}: {counted.ffn_multiply_adds:,} multiply-adds a token, {counted.ffn_parameters:,} parameters")
    return dense.to(dtype), {name: part.to(dtype) for name, part in parts.items()}


def measure(
    dense: nn.Module, blocks: dict[str, nn.Module], inputs: torch.Tensor, backward: bool, options: argparse.Namespace
) -> None:
    """Prints one table: the rows are the layers, the columns the backends."""
    functions = {"dense": step(dense, inputs, backward)}
    for name, block in blocks.items():
        functions |= {f"{name} {backend}": step(block, inputs, backward, backend) for backend in options.backends}
    times, failed = alternate(functions, inputs.device, options.budget, most=10)
    mode = "forward and backward" if backward else "forward"
    print(f"\n{inputs.shape[1]} tokens, {inputs.dtype}, {mode}; dense: {1000 * min(times['dense']):.2f} ms at best\n")
    print(f"| layer | {' | '.join(options.backends)} |\n|---|{'---:|' * len(options.backends)}")
    for name in blocks:
        keys = [f"{name} {backend}" for backend in options.backends]
        cells = [
            f"{summary(times[key], times['dense'])['ratio']:.2f}" if key in times else failed[key] for key in keys
        ]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
