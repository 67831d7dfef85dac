"""
The experts in C (folder `kernel`): one call for a layer, which reads each weight once and keeps all else in caches.

Python's ways make three products and an activation for each expert, and libraries bring the weights of each into
another order first. In C the tokens are brought into order, which are few. The files are compiled when they are first
needed, as torch.compile and Triton do, with the system's C compiler (variable CC, else cc), and kept in the assets of
the Hub's cache. Where there is no compiler, the processor lacks the instructions, or MHMOE_NATIVE=0, nothing changes
but the speed.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import cached_assets_path
from torch import Tensor
from transformers.utils import logging

from ..activations import FUNCTIONS
from ..problem import Problem
from . import memory, workers
from .processor import processor, refused
from .routing import empty_gradient


VARIABLE = "MHMOE_NATIVE"
SOURCE = Path(__file__).with_name("kernel") / "experts.c"
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-Wno-psabi", "-shared", "-fPIC")
SECONDS = 60  # after which a compiler is given up
STEP, LEAST = 2, 32  # d and i must be multiples of the first, and at least the second
PARTS, PART = 8, 64  # tasks for each thread, at least; numbers of i that a part of an expert has, at least
BITS = {torch.float32: 1, torch.bfloat16: 2}  # as `mhmoe_dtypes` answers
PLAIN = torch.Tensor, torch.nn.Parameter  # what a subclass holds is its own affair

logger = logging.get_logger(__name__)


class _Arguments(ctypes.Structure):
    """`Problem` of kernel/layer.h, which says what these are."""

    _fields_ = [
        (name, kind)
        for kind, names in (
            (ctypes.c_int64, ("bfloat16", "activation", "gated")),
            (ctypes.c_int64, ("tokens", "top_k", "experts", "width", "inner", "parts", "threads")),
            (ctypes.c_int64, ("first_expert", "first_row", "down_expert", "down_row")),
            (ctypes.c_void_p, ("hidden", "first", "down", "scales", "index")),
            (ctypes.c_void_p, ("slots", "places", "starts", "rows", "output", "parallel")),
            (ctypes.c_int64, ("float32_gradients",)),
            (ctypes.c_int64, ("grad_first_expert", "grad_first_row", "grad_down_expert", "grad_down_row")),
            (ctypes.c_void_p, ("grad_output", "grad_first", "grad_down", "grad_scales")),
        )
        for name in names
    ]


def can(problem: Problem) -> bool:
    """Whether the experts can be computed here: the files know the activation, the dtype and the sizes."""
    first_proj, down_proj, dtype = problem.first_proj, problem.down_proj, problem.dtype
    return (
        dtype in BITS
        and all(type(tensor) in PLAIN for tensor in (*problem.differentiable, problem.top_k_index))
        and problem.activation.name is not None
        and first_proj.dtype == down_proj.dtype in (dtype, torch.float32)
        and first_proj.stride(2) == down_proj.stride(2) == 1
        and all(size % STEP == 0 and size >= LEAST for size in down_proj.shape[1:])
        and problem.top_k_index.numel() > 0
        and (torch.get_num_threads() == 1 or workers.OPENMP is not None)
        # modes that watch operators see none here
        and not torch._C._len_torch_dispatch_stack()
        and dtype in dtypes()
    )


def forward(problem: Problem) -> Tensor:
    """The output (S, d), in the dtype of the products, of a problem for which `can` is true."""
    output = torch.empty_like(problem.hidden_states, dtype=problem.dtype, memory_format=torch.contiguous_format)
    _run(problem, _library().mhmoe_forward, output=output)
    return output


def backward(problem: Problem, grad_output: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """As `experts.backward`, of a problem for which `can` is true."""
    needs_hidden, needs_first, needs_down, needs_weights, *_ = needs
    first_proj, down_proj, index = problem.first_proj, problem.down_proj, problem.top_k_index
    # an expert without rows is not written; others have the ids from num_experts on
    loads = torch.bincount(index.flatten(), minlength=problem.num_experts)[: problem.num_experts]
    used = loads.nonzero().flatten().tolist()
    grad_first = empty_gradient(first_proj, used) if needs_first else None
    grad_down = empty_gradient(down_proj, used) if needs_down else None
    grad_hidden = index.new_empty(problem.hidden_states.shape, dtype=problem.dtype) if needs_hidden else None
    grad_scales = index.new_zeros(_parts(problem), *index.shape, dtype=torch.float32) if needs_weights else None
    gradients: dict[str, Any] = {"grad_first": grad_first, "grad_down": grad_down, "grad_scales": grad_scales}
    for name, gradient in (("grad_first", grad_first), ("grad_down", grad_down)):
        if gradient is not None:
            expert, row, _ = (stride * gradient.itemsize for stride in gradient.stride())
            gradients |= {f"{name}_expert": expert, f"{name}_row": row}
    _run(
        problem,
        _library().mhmoe_backward,
        output=grad_hidden,
        grad_output=grad_output.to(problem.dtype).contiguous(),
        float32_gradients=first_proj.dtype == torch.float32,
        **gradients,
    )
    return (
        None if grad_hidden is None else grad_hidden.to(problem.hidden_states.dtype),
        grad_first,
        grad_down,
        None if grad_scales is None else grad_scales.sum(0).to(problem.top_k_weights.dtype),
    )


def _run(problem: Problem, function: Callable[[Any], int], **more: Any) -> None:
    """Call the library, with `more` arguments than those of the problem."""
    dtype, index = problem.dtype, problem.top_k_index.long().contiguous()
    num_experts, width, inner = problem.down_proj.shape
    name = problem.activation.name
    assert name is not None  # as `can` says
    count, parts = index.numel(), _parts(problem)
    work = index.new_empty(2 * count + num_experts + 1)  # on the CPU, whatever the default device
    slots, places, starts = work.split([count, count, num_experts + 1])
    first, down = (_converted(weights, dtype) for weights in (problem.first_proj, problem.down_proj))
    arguments = {
        "activation": [*FUNCTIONS].index(name),
        "gated": problem.activation.gated,
        **{"bfloat16": dtype == torch.bfloat16, "tokens": len(index), "top_k": index.shape[1]},
        **{"experts": num_experts, "width": width, "inner": inner, "parts": parts},
        "threads": torch.get_num_threads(),
        **{"first_expert": first.stride(0) * dtype.itemsize, "first_row": first.stride(1) * dtype.itemsize},
        **{"down_expert": down.stride(0) * dtype.itemsize, "down_row": down.stride(1) * dtype.itemsize},
        **{"hidden": problem.hidden_states.to(dtype).contiguous(), "first": first, "down": down, "index": index},
        "scales": problem.top_k_weights.float().contiguous(),
        **{"slots": slots, "places": places, "starts": starts},
        "rows": memory.empty((parts, count, width), torch.float32),
        "parallel": ctypes.cast(workers.OPENMP.GOMP_parallel, ctypes.c_void_p) if workers.OPENMP else None,
        **more,
    }
    values = {name: value.data_ptr() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    if function(ctypes.byref(_Arguments(**values))):
        raise MemoryError("no memory for the experts' work space; take fewer tokens at a time.")


def _converted(weights: Tensor, dtype: torch.dtype) -> Tensor:
    return weights if weights.dtype == dtype else memory.empty(weights.shape, dtype).copy_(weights)


def _parts(problem: Problem) -> int:
    """Into how many tasks an expert is divided: where few experts have rows, several threads take parts of one."""
    busy = min(problem.num_experts, problem.top_k_index.numel())
    return max(min(-(-PARTS * torch.get_num_threads() // busy), problem.down_proj.shape[2] // PART), 1)


def dtypes() -> frozenset[torch.dtype]:
    """Those that can be computed here; none where there is no compiler, or it fails."""
    return frozenset() if os.environ.get(VARIABLE) == "0" else _dtypes()


@cache
def _dtypes() -> frozenset[torch.dtype]:
    library = _library()
    bits = library.mhmoe_dtypes() if library else 0
    return frozenset(dtype for dtype, bit in BITS.items() if bits & bit)


@cache
def _library() -> Any:
    """The files of `kernel`, compiled now, or as a process did before; None where that cannot be done."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if not compiler or os.name != "posix":
        return None
    command = compiler, *FLAGS, *refused()
    files = sorted(SOURCE.parent.glob("*.[ch]"))
    about = "\n".join([*command, processor(), *(file.read_text(encoding="utf-8") for file in files)])
    name, folder = f"{hashlib.sha256(about.encode()).hexdigest()[:16]}.so", _folder()
    try:
        if folder and (folder / name).exists():
            return ctypes.CDLL(str(folder / name))
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            made = Path(unfinished) / name
            run = [*command, str(SOURCE), "-o", str(made), "-lm"]
            subprocess.run(run, check=True, capture_output=True, text=True, timeout=SECONDS)
            library = ctypes.CDLL(str(made))
            if folder:
                os.replace(made, folder / name)  # whole, whatever other processes do
            return library
    except (subprocess.SubprocessError, OSError) as error:
        reason = getattr(error, "stderr", None) or error
        logger.info(f"{SOURCE.name} cannot be used ({reason}); the experts are computed by torch's own products.")
    return None


def _folder() -> Path | None:
    """Where what was compiled is kept; None where nothing can be written."""
    try:
        folder = cached_assets_path(library_name="mhmoe", namespace="native")
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None
