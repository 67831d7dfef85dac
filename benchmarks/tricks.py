"""
What does each trick of the CPU backend earn? Each is switched off by itself, in turns with the whole, in one process:

    python benchmarks/tricks.py                          # a quiet machine
    python benchmarks/tricks.py --threads 1 --clock cpu  # a busy one; what threads earn is then left out

A ratio of 1.2 means that the layer takes 1.2 times as long without the trick, at the point that it is for.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import experts
import torch
from timing import CLOCKS, DTYPES, alternate, machine, merge, positive, summary

from mhmoe.backends.cpu import choices, memory, native, workers
from mhmoe.backends.cpu import experts as cpu
from mhmoe.training.memory import keep_memory


KEYS = ("device", "threads", "clock", "trick")
IN_C = (cpu, "native_pays", lambda *_, **__: False)
# name, dtype, tokens, mode; then the module and the name in it that has another value when the trick is off; all but
# IN_C are for experts that are not computed in C
TRICKS = {
    "in C, one token": ("fp32", 1, "forward", *IN_C),
    "in C, few rows": ("fp32", 16, "forward", *IN_C),
    "in C, 512 tokens": ("fp32", 512, "forward", *IN_C),
    "in C, one token, bf16": ("bf16", 1, "forward", *IN_C),
    "in C, few rows, bf16": ("bf16", 16, "forward", *IN_C),
    "in C, 512 tokens, bf16": ("bf16", 512, "forward", *IN_C),
    "in C, with backward, bf16": ("bf16", 512, "both", *IN_C),
    "measured ways, one token": ("fp32", 1, "forward", choices, "_ways", choices.DEFAULTS.__getitem__),
    "measured ways, few rows": ("fp32", 16, "forward", choices, "_ways", choices.DEFAULTS.__getitem__),
    "measured ways, one token, bf16": ("bf16", 1, "forward", choices, "_ways", choices.DEFAULTS.__getitem__),
    "measured ways, 512 tokens, bf16": ("bf16", 512, "forward", choices, "_ways", choices.DEFAULTS.__getitem__),
    "larger batches, 512 tokens, bf16": ("bf16", 512, "forward", choices, "multiplies_tiles", lambda _: False),
    "experts for threads, forward": ("fp32", 512, "forward", workers, "OPENMP", None),
    "experts for threads, with backward": ("fp32", 512, "both", workers, "OPENMP", None),
    "memory kept": ("fp32", 512, "both", memory, "LINUX", False),
    "memory kept, against mallopt": ("fp32", 512, "both", memory, "LINUX", False),  # the last: mallopt stays
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="head3", choices=list(experts.SIZES))
    parser.add_argument("--tricks", nargs="+", default=list(TRICKS), choices=list(TRICKS))
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS))
    parser.add_argument("--budget", type=float, default=10, help="seconds for each trick")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads > 1:
        parser.error("--clock cpu: threads that wait work too; add --threads 1")
    torch.set_num_threads(options.threads)
    device = torch.device("cpu")
    for name in options.tricks:
        if TRICKS[name][3] is workers and options.threads == 1:
            print(f"{name}: not with one thread")
            continue
        if TRICKS[name][3] is cpu and DTYPES[TRICKS[name][0]] not in native.dtypes():
            print(f"{name}: not without a C compiler and instructions for it")
            continue
        if "mallopt" in name:
            keep_memory()
        row = machine(device) | {"clock": options.clock, "trick": name} | measure(name, options)
        merge(options.output_dir / "tricks.json", [row], KEYS)
        spread = f"[{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
        print(f"{name:36} {row['ratio']:.2f} {spread} times as long without it, {row['runs']} runs", flush=True)


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    """The layer without the trick, over the layer with it."""
    dtype, tokens, mode, module, attribute, without = TRICKS[name]
    point = {"part": "block", "size": options.size, "dtype": dtype, "tokens": tokens, "mode": mode}
    torch.manual_seed(0)
    _, moe = experts.make(point, DTYPES[dtype])
    inputs = torch.randn(1, tokens, experts.SIZES[options.size][0][0], dtype=DTYPES[dtype])
    run = experts.step(moe, inputs, mode == "both", "subtoken")
    run()  # measures the ways, if that was not done before
    if module is not cpu:
        run = partial(changed, *IN_C, run)
    functions = {"with": run, "without": partial(changed, module, attribute, without, run)}
    times, failed = alternate(functions, torch.device("cpu"), options.budget, 10, options.clock)
    if failed:
        raise SystemExit(f"{name}: {failed}")
    return summary(times["without"], times["with"])


def changed(module: ModuleType, name: str, value: object, run: Callable[[], None]) -> None:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        run()
    finally:
        setattr(module, name, before)


if __name__ == "__main__":
    main()
