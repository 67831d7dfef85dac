"""
Which way to a product is the fastest on this processor: measured once, and kept in a file.

Libraries differ more from processor to processor than from size to size. MKL multiplies two equal columns twice as
fast as one vector on an AMD EPYC, and half as fast on an Intel Xeon. In bfloat16, torch's own product of a matrix and
a vector takes half the time of oneDNN's on the EPYC, and as long on the Xeon. oneDNN with AMX multiplies a weight and
columns in half the time of rows and a weight. So these ways, and C, are timed when a dtype is first used. This takes
about a second, and half a second more for experts without gates. What was found is kept in the assets of the Hub's
cache, for this processor, version of torch, number of threads and the variables that its libraries read. The first
process to write it decides for the others: so all ranks agree.

MHMOE_MEASURE=0 switches this off: then DEFAULTS hold. All ways have the same result but for its last bits.
"""

import hashlib
import json
import math
import operator
import os
import tempfile
import threading
import time
from bisect import bisect_left
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple, TypeVar

import torch
from huggingface_hub import cached_assets_path

from ...version import __version__
from ..activations import named
from ..problem import Problem
from . import native
from .processor import instructions, multiplies_tiles, processor, variables
from .tuning import (
    BETTER,
    LOADS,
    MEASURED_EXPERTS,
    MEASURED_SECONDS,
    MEASURED_SIZES,
    READ_ROWS,
    SMALL,
    SMALL_16_BIT,
    SMALL_MATRIX,
    TILES,
)


T = TypeVar("T")
VARIABLE = "MHMOE_MEASURE"
WITHOUT_ONE_DNN = "vectors without oneDNN"  # torch's own loop: a switch of the whole process, where it is worth that
Way = Literal["two columns", "vectors", "vectors without oneDNN", "one row", "rows", "narrow", "at once", "columns"]
# of one row of an expert, then of as many as LOADS says; the first is taken unless another is clearly faster.
# "narrow" are a few rows as columns, among others; "at once" takes all of `grouped.py`, "columns" of `columns.py`.
POSSIBLE: dict[torch.dtype, tuple[tuple[Way, ...], ...]] = {
    torch.float32: (
        ("two columns", "vectors", "one row"),
        ("narrow", "rows", "at once"),
        *[("rows",)] * 2,
    ),
    torch.bfloat16: (
        ("vectors", WITHOUT_ONE_DNN, "one row"),
        ("rows", "vectors", "at once", "columns"),
        *[("rows", "columns")] * 2,
    ),
    torch.float16: (("vectors", "one row"), ("rows", "at once", "columns"), *[("rows", "columns")] * 2),
    torch.float64: (("two columns",), ("rows",), ("rows",), ("rows",)),
}
BOUNDS = [math.sqrt(low * high) for low, high in pairwise(LOADS)]
DEFAULTS = {dtype: tuple(ways[0] for ways in possible) for dtype, possible in POSSIBLE.items()}
NEVER = (False,) * len(LOADS) * len(MEASURED_SIZES)


class Found(NamedTuple):
    """For each of LOADS, the fastest way of Python's; for each of MEASURED_SIZES and LOADS, whether C is faster."""

    ways: tuple[Way, ...]
    native: tuple[bool, ...]


class Key(NamedTuple):
    """What is measured for itself; `in_c`: whether C may be used."""

    dtype: torch.dtype
    threads: int
    with_gradients: bool
    gated: bool
    in_c: bool


_made: dict[Key, Found] = {}
_lock = threading.RLock()  # one thread measures; what it runs asks here again


def way(dtype: torch.dtype, load: float) -> Way:
    """For experts that have `load` rows on average."""
    return _ways(dtype)[_nearest(load)]


def native_pays(problem: Problem, with_gradients: bool = False) -> bool:
    """Whether C is the fastest way to what it can compute."""
    if problem.activation.name is None:  # which it cannot
        return False
    place = _nearest(problem.top_k_index.numel() / problem.num_experts)
    if problem.first_proj[0].numel() <= SMALL_MATRIX:
        place += len(LOADS)
    return _found(problem.dtype, with_gradients, problem.activation.gated).native[place]


def _nearest(load: float) -> int:
    """The place of the load that is nearest, as a ratio."""
    return bisect_left(BOUNDS, load)


def _ways(dtype: torch.dtype) -> tuple[Way, ...]:
    return _found(dtype).ways


def _found(dtype: torch.dtype, with_gradients: bool = False, gated: bool = True) -> Found:
    # what is timed under a mode that follows operators would be followed too
    if os.environ.get(VARIABLE) == "0" or dtype == torch.float64 or torch._C._len_torch_dispatch_stack():
        return Found(DEFAULTS[dtype], NEVER)
    key = _key(dtype, with_gradients, gated)
    return _made.get(key) or _make(key)


def _key(dtype: torch.dtype, with_gradients: bool = False, gated: bool = True) -> Key:
    return Key(dtype, torch.get_num_threads(), with_gradients, gated, dtype in native.dtypes())


def load(problem: Problem) -> float:
    """Rows of an expert, on average: two at least, since single ones are for `few_rows.py`."""
    return max(problem.top_k_index.numel() / problem.num_experts, LOADS[1])


def small(problem: Problem) -> bool:
    """Whether the products of an expert take less time than the calls for them: then experts go together."""
    numbers, most = problem.first_proj[0].numel(), SMALL if problem.dtype.itemsize > 2 else SMALL_16_BIT
    rows = problem.top_k_index.numel() / problem.num_experts
    return numbers <= SMALL_MATRIX and (rows + READ_ROWS) * numbers <= most


def row_cost(problem: Problem) -> int:
    """Multiply-adds of a row's first product; where tiles are multiplied, as many as take that long elsewhere."""
    numbers = problem.first_proj[0].numel()
    return max(numbers // TILES, 1) if multiplies_tiles(problem.dtype) else numbers


def _make(key: Key) -> Found:
    dtype = key.dtype
    with _lock:
        if key not in _made:
            about = {
                "processor": processor(),
                "instructions": instructions(),
                "variables": variables(),
                "torch": torch.__version__,
                "mhmoe": __version__,
                "dtype": str(dtype),
                "threads": key.threads,
                "with gradients": key.with_gradients,
                "gated": key.gated,
                "loads": LOADS,
                "possible": POSSIBLE[dtype],
                "C": key.in_c,
            }
            name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
            # the ways that are found for outputs of gated experts hold for all
            measure = partial(_measure_c, key=key) if key.with_gradients or not key.gated else _measure
            try:
                file = cached_assets_path(library_name="mhmoe", namespace="processors") / f"{name}.json"
            except OSError:  # no folder can be made there
                _made[key] = measure(dtype)
            else:
                _made[key] = _kept(file, dtype) or _keep(file, about, measure(dtype), dtype)
        return _made[key]


def _kept(file: Path, dtype: torch.dtype) -> Found | None:
    """What was found before, if that is there and whole."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        found = Found(tuple(kept["ways"]), tuple(kept["faster in C"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    possible = POSSIBLE[dtype]
    whole = len(found.ways) == len(possible) and all(map(operator.contains, possible, found.ways))
    return found if whole and len(found.native) == len(NEVER) and {*found.native} <= {True, False} else None


def _keep(file: Path, about: dict, found: Found, dtype: torch.dtype) -> Found:
    """Write what was found, unless another process did so first; returns what holds for all of them."""
    try:
        descriptor, unfinished = tempfile.mkstemp(dir=file.parent)
        try:
            with open(descriptor, "w", encoding="utf-8") as stream:
                json.dump(about | {"ways": found.ways, "faster in C": found.native}, stream, indent=1)
            if file.exists() and _kept(file, dtype) is None:  # damaged
                os.replace(unfinished, file)
                return found
            os.link(unfinished, file)  # which fails if it is there
        finally:
            Path(unfinished).unlink(missing_ok=True)
    except FileExistsError:
        return _kept(file, dtype) or found
    except OSError:  # nothing can be written there, or it knows no links: each process measures
        pass
    return found


@torch.no_grad()
def _measure(dtype: torch.dtype) -> Found:
    """
    With the threads that there are: some ways share out experts among them, others the numbers of each product. Those
    of one row, which all share out numbers, in one thread: calls of several would hide how fast larger matrices are
    read.
    """
    ways, threads, weights = list(DEFAULTS[dtype]), torch.get_num_threads(), _weights(dtype, MEASURED_SIZES[0])

    def seconds(run: Callable[[], object], place: int, way: Way) -> float:
        """That `run` takes with this way in that place."""
        ways[place] = way
        _made[_key(dtype)] = Found(tuple(ways), NEVER)
        return _seconds(run)

    try:
        for place, (load, count, possible) in enumerate(zip(LOADS, MEASURED_EXPERTS, POSSIBLE[dtype], strict=True)):
            if len(possible) > 1:
                run = partial(_experts().inference, _example(weights, count, load))
                torch.set_num_threads(threads if place else 1)
                ways[place] = _fastest(partial(seconds, run, place), possible)
    finally:
        for number in 1, threads:  # the first may be known already; then its file says so again
            torch.set_num_threads(number)
            _made.pop(_key(dtype), None)
    return _compare_with_c(_key(dtype), tuple(ways))


def _measure_c(dtype: torch.dtype, key: Key) -> Found:
    """The ways that were found, against C."""
    return _compare_with_c(key, _ways(dtype))


def _compare_with_c(key: Key, ways: tuple[Way, ...]) -> Found:
    in_c, with_gradients = list(NEVER), key.with_gradients

    def seconds(run: Callable[[], object], place: int, value: bool) -> float:
        in_c[place] = value
        _made[key] = Found(ways, tuple(in_c))
        return _seconds(run)

    try:
        for first, size in zip((0, len(LOADS)), MEASURED_SIZES, strict=True):
            weights = _weights(key.dtype, size, key.gated)
            for place, (load, count) in enumerate(zip(LOADS, MEASURED_EXPERTS, strict=True), first):
                if with_gradients and load == LOADS[0]:
                    continue  # as of two rows: gradients of all weights take so long that a row more does not count
                problem = _example(weights, count, load)
                run = partial(_with_gradients if with_gradients else _experts().inference, problem)
                if native.can(problem):
                    in_c[place] = _fastest(partial(seconds, run, place), (False, True))
    finally:
        _made.pop(key, None)
    if with_gradients:
        in_c[:: len(LOADS)] = in_c[1 :: len(LOADS)]
    return Found(ways, tuple(in_c))


@torch.enable_grad()
def _with_gradients(problem: Problem) -> None:
    tensors = [tensor.requires_grad_() for tensor in problem.differentiable]
    torch.autograd.grad(_experts().experts(problem), tensors, problem.hidden_states.detach())


def _weights(dtype: torch.dtype, size: tuple[int, int], gated: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Of as many experts of that size (d, i) as are measured at most."""
    (width, inner), count = size, max(MEASURED_EXPERTS)
    shapes = (count, (1 + gated) * inner, width), (count, width, inner)
    first_proj, down_proj = (torch.full(shape, 0.01, dtype=dtype, device="cpu") for shape in shapes)
    return first_proj, down_proj


def _seconds(run: Callable[[], object]) -> float:
    """That `run` takes. One thread is timed by its own clock, which is the same on a busy machine."""
    clock = time.perf_counter if torch.get_num_threads() > 1 else time.thread_time
    start = clock()
    run()
    return clock() - start


def _experts() -> ModuleType:
    from . import experts  # which asks here

    return experts


def _fastest(seconds: Callable[[T], float], possible: tuple[T, ...]) -> T:
    """The first, or the fastest if that is clearly faster. They run in turns; the best of each counts."""
    seconds(possible[0])  # makes buffers and programs, as does the first run of each
    if seconds(possible[0]) > MEASURED_SECONDS:  # a processor without instructions for this dtype: not worth the wait
        return possible[0]
    for candidate in possible[1:]:
        seconds(candidate)
    best, spent = dict.fromkeys(possible, float("inf")), 0.0
    while spent < MEASURED_SECONDS:
        for candidate in possible:
            took = seconds(candidate)
            best[candidate] = min(best[candidate], took)
            spent += took
    return min(possible, key=lambda candidate: best[candidate] * (1 if candidate == possible[0] else BETTER))


def _example(weights: tuple[torch.Tensor, torch.Tensor], count: int, load: int) -> Problem:
    """The first `count` experts, which have `load` rows each; where these are many, on average."""
    first_proj, down_proj = (weight[:count].detach() for weight in weights)
    dtype, width = first_proj.dtype, first_proj.shape[2]
    hidden_states = torch.full((count * load, width), 0.01, dtype=dtype, device="cpu")
    top_k_weights = torch.ones(count * load, 1, dtype=dtype, device="cpu")
    index = torch.arange(count, device="cpu").repeat_interleave(load)[:, None]
    if load > LOADS[0]:  # as in a model: some experts have a single row, and filling neighbours up takes time
        index = torch.randint(count, index.shape, generator=torch.Generator().manual_seed(0), device="cpu")
    gated = first_proj.shape[1] > down_proj.shape[2]
    activation = named("silu" if gated else "gelu", gated)
    return Problem(hidden_states, first_proj, down_proj, top_k_weights, index, activation, dtype)
