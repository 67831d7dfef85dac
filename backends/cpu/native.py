"""
The experts in C (native.c), forward: one call for a layer, which reads each weight once and keeps all else in caches.

Python's ways make three products and an activation for each expert, and libraries bring the weights of each into
another order first. In C the tokens are brought into order, which are few. The file is compiled when it is first
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
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import cached_assets_path
from torch import Tensor
from transformers.utils import logging

from ..activations import SwiGLU
from ..problem import Problem
from . import memory, workers
from .processor import processor, refused


VARIABLE = "MHMOE_NATIVE"
SOURCE = Path(__file__).with_name("native.c")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-Wno-psabi", "-shared", "-fPIC")
SECONDS = 60  # after which a compiler is given up
STEP, LEAST = 8, 32  # d and i must be multiples of the first, and at least the second
PARTS, PART = 8, 64  # tasks for each thread, at least; numbers of i that a part of an expert has, at least
BITS = {torch.float32: 1, torch.bfloat16: 2}  # as `mhmoe_dtypes` answers

logger = logging.get_logger(__name__)


class _Arguments(ctypes.Structure):
    """`Problem` of native.c."""

    _fields_ = [
        *[
            (name, ctypes.c_int64)
            for name in ("bfloat16", "tokens", "top_k", "experts", "width", "inner", "parts", "threads")
        ],
        *[(name, ctypes.c_int64) for name in ("first_expert", "first_row", "down_expert", "down_row")],
        *[(name, ctypes.c_void_p) for name in ("hidden", "first", "down", "scales", "index")],
        *[(name, ctypes.c_void_p) for name in ("slots", "places", "starts", "rows", "output", "parallel")],
    ]


def can(problem: Problem) -> bool:
    """Whether the experts can be computed here: gated with SiLU, in a dtype and of sizes that native.c knows."""
    first_proj, down_proj, dtype = problem.first_proj, problem.down_proj, problem.dtype
    return (
        dtype in BITS
        and isinstance(problem.activation, SwiGLU)
        and first_proj.dtype == down_proj.dtype == dtype
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
    dtype, first_proj, down_proj = problem.dtype, problem.first_proj, problem.down_proj
    num_experts, width, inner = down_proj.shape
    tokens, top_k = problem.top_k_index.shape
    threads, count = torch.get_num_threads(), tokens * top_k
    hidden_states, index = problem.hidden_states.to(dtype).contiguous(), problem.top_k_index.long().contiguous()
    scales = problem.top_k_weights.float().contiguous()
    # where few experts have rows, several threads take parts of one
    parts = max(min(-(-PARTS * threads // min(num_experts, count)), inner // PART), 1)
    slots, places, starts = torch.empty(2 * count + num_experts + 1, dtype=torch.int64).split(
        [count, count, num_experts + 1]
    )
    rows = memory.empty((parts, count, width), torch.float32)
    output = torch.empty(tokens, width, dtype=dtype)
    arguments = _Arguments(
        dtype == torch.bfloat16,
        *(tokens, top_k, num_experts, width, inner, parts, threads),
        *(stride * dtype.itemsize for proj in (first_proj, down_proj) for stride in proj.stride()[:2]),
        *(tensor.data_ptr() for tensor in (hidden_states, first_proj, down_proj, scales, index)),
        *(tensor.data_ptr() for tensor in (slots, places, starts, rows, output)),
        ctypes.cast(workers.OPENMP.GOMP_parallel, ctypes.c_void_p) if workers.OPENMP else None,
    )
    if _library().mhmoe_experts(ctypes.byref(arguments)):
        raise MemoryError("no memory for the experts' work space; take fewer tokens at a time.")
    return output


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
    """native.c, compiled now, or as a process did before; None where that cannot be done."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if not compiler or os.name != "posix":
        return None
    command = compiler, *FLAGS, *refused()
    about = "\n".join([*command, processor(), SOURCE.read_text(encoding="utf-8")])
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
