"""What the speed benchmarks share: alternating runs, peak memory, the machine's rates, results in one JSON."""

import argparse
import ctypes
import gc
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from mhmoe.backends.cpu import memory
from mhmoe.backends.cpu.processor import instructions, processor, variables


# seconds that pass, or that the processor works: in one thread the latter are the same on a busy machine
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def positive(text: str) -> int:
    """A type of argparse's."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number, 1 or more")
    return int(text)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], object], device: torch.device, clock: str = "wall") -> float:
    synchronize(device)
    start = CLOCKS[clock]()
    function()
    synchronize(device)
    return CLOCKS[clock]() - start


def alternate(
    functions: dict[str, Callable[[], object]], device: torch.device, budget: float, most: float, clock: str = "wall"
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """
    Seconds of each function, run in turns until `budget` seconds have passed, at least three times each after one run
    that does not count; and why the others have none: that run failed, or took more than `most` seconds. Each turn has
    an order of its own, or whoever follows one that reads the same weights would always find them in the cache.
    """
    times, skipped = {}, {}
    for name, function in functions.items():
        try:
            function()  # makes buffers, thread pools, compiled code
            once = seconds(function, device)
        except Exception as error:  # whatever a backend cannot do is its result
            skipped[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
            continue
        if once > most:
            skipped[name] = f"one run takes {once:.1f} s, more than {most:g} s"
        else:
            times[name] = []
    end = time.perf_counter() + budget
    order, shuffle = list(times), random.Random(0).shuffle
    while times and (time.perf_counter() < end or len(next(iter(times.values()))) < 3):
        shuffle(order)
        for name in order:
            times[name].append(seconds(functions[name], device, clock))
    return times, skipped


def summary(times: list[float], baseline: list[float]) -> dict[str, float]:
    """Milliseconds, and the ratio to the baseline's run of the same turn: medians, and where 80% of the runs are."""
    ratios = [own / base for own, base in zip(times, baseline, strict=True)]
    row = {"runs": len(times)}
    for name, values in (("ms", [1000 * own for own in times]), ("ratio", ratios)):
        deciles = statistics.quantiles(values, n=10, method="inclusive")
        row |= {name: statistics.median(values), f"{name}_low": deciles[0], f"{name}_high": deciles[-1]}
    return row


def peak_bytes(function: Callable[[], object], device: torch.device) -> int | None:
    """Memory that one run takes beyond what is held before it; None where the system does not tell."""
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        memory.release()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        return None
    before = _status("VmRSS")
    function()
    return max(_status("VmHWM") - before, 0)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def rates(dtype: torch.dtype, device: torch.device, clock: str = "wall") -> dict[str, float]:
    """The best that this machine did: FLOPs per second of a matrix product, bytes per second of a copy."""
    size = 8192 if device.type == "cuda" else 768  # on a CPU so short that some run is not disturbed
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.ones(1 << 26, device=device)
    target = torch.empty_like(source)
    product = min(seconds(lambda: left @ right, device, clock) for _ in range(100))
    copy = min(seconds(lambda: target.copy_(source), device, clock) for _ in range(20))
    return {"flops": 2 * size**3 / product, "bytes": 2 * source.nbytes / copy}


def machine(device: torch.device) -> dict[str, object]:
    if device.type == "cuda":
        name, used = torch.cuda.get_device_name(device), ""
    else:  # a variable that limits instructions stands in for another processor
        name, used = ", ".join([processor(), *map("=".join, variables().items())]), instructions()
    return {
        "device": name,
        "instructions": used,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],  # how busy others kept it
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def merge(file: Path, rows: list[dict], keys: tuple[str, ...]) -> list[dict]:
    """Write `rows` into the JSON list in `file`, in place of those with the same `keys`; returns them all."""
    old = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    merged = {tuple(row[key] for key in keys): row for row in [*old, *rows]}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(list(merged.values()), indent=1) + "\n", encoding="utf-8")
    return list(merged.values())
