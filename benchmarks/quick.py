"""
Which experts backend should you take on this machine? Two minutes on CPU:

    python benchmarks/quick.py

Times an MoE layer against one dense SwiGLU of the same FLOPs, forward for some numbers of tokens and with backward for
the largest, on the backends that one would take. All run in turns in one process; ratios are to the dense run of the
same turn. Other programs disturb it, so close them. `benchmarks/experts.py` measures more, and keeps it.
"""

import argparse
import itertools
from argparse import Namespace

import experts
import torch
from timing import DTYPES, machine, positive
from tqdm import tqdm


BACKENDS = ["subtoken", "grouped_mm", "batched_mm"]
CLEAR = 1.05  # less than this could be chance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="head3", choices=list(experts.SIZES), help="layer, as experts.py names them")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 512, 2048])
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--budget", type=float, default=6, help="seconds for each point, all backends together")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cpu")
    about = machine(device)
    print(f"{about['device']}, {about['instructions']}, {options.threads} threads, torch {about['torch']}\n")
    points = [
        {"part": "block", "size": options.size, "dtype": dtype, "tokens": tokens, "mode": mode}
        for dtype, tokens, mode in itertools.product(options.dtypes, options.tokens, ("forward", "both"))
        if mode == "forward" or tokens == max(options.tokens)
    ]
    measured = [(point, measure(point, options)) for point in tqdm(points, unit="point")]
    print(*table(measured), "", *advice(measured), sep="\n")


def measure(point: dict, options: Namespace) -> dict[str, float]:
    """Time over that of the dense layer, of each backend that can do the point."""
    names = [name for name in BACKENDS if name != "batched_mm" or point["tokens"] <= 16]  # which copies many weights
    settings = Namespace(backends=names, memory=8, budget=options.budget, most=10, clock="wall")
    unlimited = {"flops": float("inf"), "bytes": float("inf")}  # the lowest possible time is not asked for
    rows = experts.measure(point, settings, torch.device("cpu"), unlimited)
    return {row["backend"]: row["ratio"] for row in rows if "ratio" in row and row["backend"] != "dense"}


def table(measured: list[tuple[dict, dict[str, float]]]) -> list[str]:
    """Lines: a point each, its times over the dense layer's, and what is the fastest."""
    lines = [
        "time over that of a dense layer of equal FLOPs",
        f"{'':30}" + "".join(f"{name:>12}" for name in BACKENDS),
    ]
    for point, ratios in measured:
        what = "forward" if point["mode"] == "forward" else "with backward"
        label = f"{point['dtype']}, {point['tokens']} tokens, {what}"
        cells = (f"{ratios[name]:.2f}" if name in ratios else "-" for name in BACKENDS)
        lines.append(f"{label:34}" + "".join(f"{cell:>12}" for cell in cells))
    return lines


def advice(measured: list[tuple[dict, dict[str, float]]]) -> list[str]:
    """What to take, in words; the default unless another is clearly faster somewhere."""
    default, lines = BACKENDS[0], []
    for point, ratios in measured:
        best = min(ratios, key=ratios.__getitem__)
        if default in ratios and ratios[default] > CLEAR * ratios[best]:
            task = "training" if point["mode"] == "both" else "decoding" if point["tokens"] <= 16 else "long prompts"
            faster = ratios[default] / ratios[best]
            lines.append(
                f"For {task} in {point['dtype']} ({point['tokens']} tokens) take {best}: {faster:.2f} times as fast. "
                f'model.set_experts_implementation("{best}")'
            )
    if not lines:
        return [f"Take {default}, the default: no other backend was faster here by more than {CLEAR - 1:.0%}."]
    return [*lines, f"For everything else take {default}, the default."]


if __name__ == "__main__":
    main()
