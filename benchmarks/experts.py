"""
How long do MoE layers take against one dense FFN of the same FLOPs, on every experts backend?

    python benchmarks/experts.py                                  # all of it: hours on a CPU
    python benchmarks/experts.py --quick                          # minutes
    python benchmarks/experts.py --sizes head3 --tokens 1 2048 --dtypes bf16 --backends subtoken grouped_mm

All backends and the dense layer run in turns in one process; ratios are to the dense run of the same turn. The floor
is what the machine needs at least: max(FLOPs / measured rate of a matrix product, bytes of the weights touched /
measured bandwidth), with the weights read once forward, and read once more and their gradients written backward.
Writes experts.json and the pictures of plots.py in the output folder, and adds to what is there. What was not run, and
why, is in the JSON and printed: nothing is left out silently.
"""

import argparse
import copy
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch
from plots import draw_experts
from timing import CLOCKS, DTYPES, alternate, machine, merge, peak_bytes, positive, rates, summary
from torch import nn
from transformers.utils import is_kernels_available

from mhmoe import MHMoEConfig, MHMoEModel
from mhmoe.modeling_mhmoe.experts import MHMoEMLP, MHMoETwoMatrixMLP
from mhmoe.modeling_mhmoe.modeling_mhmoe import MHMoESparseMoeBlock


# (d, inner size of the dense layer of equal FLOPs), then (h, E, k, i): P2's experiment, also at the width of
# pretraining.sh, and two layers with the multiply-adds of the FFN of Llama 3.2 1B and of Llama 2 7B, as a conversion
# without a shared expert would make them; and a layer of ViT-base's twin, in P1's form
SIZES = {
    "small": ((168, 448), (3, 96, 3, 112)),
    "smoe": ((768, 2048), (1, 8, 1, 2048)),
    "fine": ((768, 2048), (1, 16, 2, 1024)),
    "head2": ((768, 2048), (2, 40, 2, 768)),
    "head3": ((768, 2048), (3, 96, 3, 512)),
    "1b": ((2048, 8192), (4, 32, 2, 3416)),
    "7b": ((4096, 11008), (4, 16, 2, 4136)),
    "vit": ((768, 3072), (4, 8, 2, 1152)),
}
WITHOUT_GATES = {"vit": "gelu"}  # and their activation
LAYERS = {"1b": 16, "7b": 32}  # decoder layers of the whole model; 12 for P2's, of which every second is MoE
BACKENDS = ["subtoken", "grouped_mm", "batched_mm", "eager"]
COMPILED = "+compile"
INPUTS = 8  # different ones, in turns
KEYS = ("device", "threads", "part", "size", "dtype", "tokens", "mode", "backend")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["block", "model"], choices=["block", "model"])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 512, 4096, 16384])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--modes", nargs="+", default=["forward", "both"], choices=["forward", "both"])
    parser.add_argument("--backends", nargs="+", help=f"names of transformers'; NAME{COMPILED} compiles the layer")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--budget", type=float, default=20, help="seconds for each point, all backends together")
    parser.add_argument("--most", type=float, default=10, help="seconds that one run may take")
    parser.add_argument("--memory", type=float, default=8, help="GB that a point may take")
    parser.add_argument(
        "--clock", default="wall", choices=list(CLOCKS), help="cpu, with --threads 1: if others work too"
    )
    parser.add_argument("--quick", action="store_true", help="P2's head3 block alone, 3 s a point, nothing compiled")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.quick:
        options.parts, options.sizes, options.tokens, options.budget = ["block"], ["head3"], [1, 16, 512, 2048], 3
    if options.backends is None:
        options.backends = list(BACKENDS)
        if options.device.startswith("cuda") and is_kernels_available():
            options.backends.append("sonicmoe")
        if not options.quick:
            options.backends += [name + COMPILED for name in options.backends]
    if options.clock == "cpu" and options.threads > 1:
        parser.error("--clock cpu: threads that wait work too; add --threads 1")
    torch.set_num_threads(options.threads)
    run(options)


def run(options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    file = options.output_dir / "experts.json"
    for dtype_name in options.dtypes:
        best = rates(DTYPES[dtype_name], device, options.clock)
        for part in options.parts:
            for size in options.sizes:
                for tokens in options.tokens:
                    for mode in options.modes:
                        point = {"part": part, "size": size, "dtype": dtype_name, "tokens": tokens, "mode": mode}
                        print(*point.values(), flush=True)
                        about = machine(device) | {"clock": options.clock}
                        rows = [about | point | row for row in measure(point, options, device, best)]
                        everything = merge(file, rows, KEYS)
                        print(*map(line, rows), sep="\n", flush=True)
                        draw_experts(everything, options.output_dir)


def measure(point: dict, options: argparse.Namespace, device: torch.device, best: dict[str, float]) -> list[dict]:
    """Rows of one point: the dense layer's and every backend's, or why there is none."""
    dtype, tokens, backward = DTYPES[point["dtype"]], point["tokens"], point["mode"] == "both"
    names = ["dense", *options.backends]
    needed = memory(point, backward)
    if needed > options.memory * 1e9:
        reason = f"takes {needed / 1e9:.1f} GB, more than {options.memory:g} GB"
        return [{"backend": name, "skipped": reason} for name in names]
    torch.manual_seed(0)
    with torch.device(device):
        dense, moe = make(point, dtype)
        inputs = torch.randn(INPUTS, tokens, SIZES[point["size"]][0][0], dtype=dtype)
    functions, skipped = {"dense": step(dense, inputs, backward)}, {}
    for name in options.backends:
        # batched_mm copies an expert's weights for every row
        copies = moe_rows(point) * expert_bytes(point) * (2 if backward else 1)
        if name.startswith("batched_mm") and copies > options.memory * 1e9:
            skipped[name] = f"copies {copies / 1e9:.0f} GB of weights, more than {options.memory:g} GB"
        else:
            functions[name] = step(moe, inputs, backward, name)
    times, failed = alternate(functions, device, options.budget, options.most, options.clock)
    if "dense" not in times:
        return [{"backend": name, "skipped": f"dense: {failed['dense']}"} for name in names]
    floor = 1000 * lowest_time(point, moe, inputs, best)
    rows = []
    for name in names:
        if name in times:
            row = summary(times[name], times["dense"]) | {"peak_bytes": peak_bytes(functions[name], device)}
            rows.append({"backend": name} | row | ({} if name == "dense" else {"floor_ms": floor}))
        else:
            rows.append({"backend": name, "skipped": skipped.get(name) or failed[name]})
    torch.compiler.reset()
    return rows


def make(point: dict, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """The dense part and the MoE part, freshly drawn."""
    (hidden_size, dense_size), (heads, experts, top_k, inner_size) = SIZES[point["size"]]
    layers = LAYERS.get(point["size"], 12)
    fields = {
        "vocab_size": 32,  # the embedding is no part of this
        "hidden_size": hidden_size,
        "intermediate_size": dense_size,
        "num_hidden_layers": layers,
        "decoder_sparse_step": 1 if point["size"] in LAYERS else 2,
        "num_attention_heads": hidden_size // 64,
        "num_moe_heads": heads,
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": inner_size,
        "max_position_embeddings": 32768,
    }
    mlp = MHMoEMLP
    if activation := WITHOUT_GATES.get(point["size"]):
        mlp, fields = MHMoETwoMatrixMLP, fields | {"gated_mlp": False, "hidden_act": activation}
    config = MHMoEConfig(**fields)
    if point["part"] == "model":
        dense_config = MHMoEConfig(**fields, mlp_only_layers=list(range(layers)))
        return MHMoEModel(dense_config).to(dtype), MHMoEModel(config).to(dtype)
    parts = mlp(config, dense_size), MHMoESparseMoeBlock(config)
    for parameter in (parameter for part in parts for parameter in part.parameters()):
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return tuple(part.to(dtype) for part in parts)


def step(module: nn.Module, inputs: torch.Tensor, backward: bool, backend: str | None = None) -> Callable[[], None]:
    """
    One run of a module on a backend, each time with the next of `inputs` (n, T, d): the same rows each time would be
    of the same shapes, for which a library has its programs ready.
    """
    if backend is not None:
        module = on_backend(module, backend.removesuffix(COMPILED))
    run_module = torch.compile(module) if backend is not None and backend.endswith(COMPILED) else module
    grad_output = torch.randn_like(inputs[:1])
    all_inputs = cycle(inputs.split(1))

    def function() -> None:
        rows = next(all_inputs).detach().requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            output = run_module(inputs_embeds=rows) if isinstance(module, MHMoEModel) else run_module(rows)
            output = output if isinstance(output, torch.Tensor) else output.last_hidden_state
        if backward:
            output.backward(grad_output)
            module.zero_grad(set_to_none=True)

    return function


def on_backend(module: nn.Module, backend: str) -> nn.Module:
    """
    A copy that has the same weights. To set the field of one config in each run would take as long as a tenth of what
    a layer takes for a token.
    """
    module = copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})
    config = module.config if hasattr(module, "config") else module.experts.config
    config._experts_implementation = backend
    return module


def moe_rows(point: dict) -> int:
    heads, _, top_k, _ = SIZES[point["size"]][1]
    return point["tokens"] * heads * top_k


def expert_bytes(point: dict) -> int:
    (hidden_size, _), (heads, _, _, inner_size) = SIZES[point["size"]]
    return matrices(point) * hidden_size // heads * inner_size * DTYPES[point["dtype"]].itemsize


def matrices(point: dict) -> int:
    """Of an FFN."""
    return 2 if point["size"] in WITHOUT_GATES else 3


def memory(point: dict, backward: bool) -> float:
    """Bytes of both parts' weights and, with gradients, theirs again; and of what the widest layers keep."""
    (hidden_size, dense_size), (heads, experts, _, inner_size) = SIZES[point["size"]]
    itemsize = DTYPES[point["dtype"]].itemsize
    layers = LAYERS.get(point["size"], 12) if point["part"] == "model" else 1
    moe_layers = layers if point["size"] in LAYERS or layers == 1 else layers // 2
    weights = moe_layers * experts * expert_bytes(point)
    weights += 2 * layers * (matrices(point) * hidden_size * dense_size + 4 * hidden_size**2) * itemsize
    rows = max(moe_rows(point) * (4 * inner_size + 4 * hidden_size // heads), point["tokens"] * 4 * dense_size)
    return weights * (2 if backward else 1) + rows * itemsize * (layers if backward else 1)


@torch.no_grad()
def lowest_time(point: dict, moe: nn.Module, inputs: torch.Tensor, best: dict[str, float]) -> float:
    """Seconds that the FLOPs or the weights that this input touches take at the machine's best rates."""
    moe, touched = on_backend(moe, "grouped_mm" if inputs.is_cuda else "subtoken"), {}

    def count(experts: nn.Module, arguments: tuple, _: object) -> None:
        touched[experts] = arguments[1].unique().numel()

    blocks = [module for module in moe.modules() if isinstance(module, MHMoESparseMoeBlock)]
    handles = [block.experts.register_forward_hook(count) for block in blocks]
    step(moe, inputs, backward=False)()
    for handle in handles:
        handle.remove()
    multiply_adds = weights = 0
    experts = {block.experts for block in blocks}
    for module in moe.modules():
        if module in experts:
            size = sum(weight[0].numel() for weight in module.parameters())
            multiply_adds += moe_rows(point) * size
            weights += touched[module] * size
        elif isinstance(module, nn.Linear):
            multiply_adds += point["tokens"] * module.weight.numel()
            weights += module.weight.numel()
    passes = 3 if point["mode"] == "both" else 1
    flops, numbers = 2 * multiply_adds * passes, weights * passes
    return max(flops / best["flops"], numbers * inputs.element_size() / best["bytes"])


def line(row: dict) -> str:
    if "skipped" in row:
        return f"  {row['backend']:22} skipped: {row['skipped']}"
    peak = "" if row["peak_bytes"] is None else f"  peak {row['peak_bytes'] / 1e6:7.0f} MB"
    floor = f"  floor {row['floor_ms']:.2f} ms" if "floor_ms" in row else ""
    return (
        f"  {row['backend']:22} x{row['ratio']:6.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
        f"  {row['ms']:9.2f} ms [{row['ms_low']:.2f}, {row['ms_high']:.2f}]  {row['runs']} runs{peak}{floor}"
    )


if __name__ == "__main__":
    main()
