"""
Compiles what the Triton experts launch for a GPU that need not be there, and prints a JSON list of kernels: dtype,
tokens, name, threads, bytes of shared memory, a thread's registers and stack, and the numbers of some instructions.

The tensors are on the device "meta", which has sizes and no numbers: what would wait for a number of the GPU fails.
Arguments: compute capability, and of each case dtype:tokens.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from mhmoe.backends.triton import experts as gpu


EXPERTS, WIDTH, INNER, TOP_K = 96, 256, 512, 3
INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "mma": r"mma\.sync",
    "copies": r"cp\.async\.c[ag]\.shared\.global.* 0x10",  # of 16 bytes
}


class Target:
    """As much of a driver as compiling wants."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def usage(kernel) -> dict[str, int]:
    """Registers of a thread, and the bytes of its stack, where registers spill to."""
    program = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        output = subprocess.run([program, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {
        key: int(re.search(rf"{name}:(\d+)", output)[1]) for key, name in (("registers", "REG"), ("stack", "STACK"))
    }


def launch(dtype: torch.dtype, tokens: int) -> None:
    """A forward and a backward pass."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    routing = gpu.route(empty(tokens, TOP_K, dtype=torch.int64), EXPERTS, dtype)
    weights = empty(EXPERTS, 2 * INNER, WIDTH), empty(EXPERTS, WIDTH, INNER)
    inputs = (empty(tokens, WIDTH), *weights, empty(tokens, TOP_K))
    output, first = gpu.forward(*inputs, *routing, True, False)
    gpu.backward(output, *inputs, first, *routing, False, [True] * 4)


def compiled(case: str) -> list[dict]:
    """The kernels of a case, which are compiled instead of run."""
    dtype, tokens = case.split(":")
    kernels = []

    def compile_alone(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        kernels.append((self.__name__, kernel))

    run, JITFunction.run = JITFunction.run, compile_alone
    launch(getattr(torch, dtype), int(tokens))
    JITFunction.run = run
    return [
        {
            "dtype": dtype,
            "tokens": int(tokens),
            "name": name,
            "threads": 32 * kernel.metadata.num_warps,
            "shared": kernel.metadata.shared,
            **usage(kernel),
            **{key: len(re.findall(pattern, kernel.asm["ptx"])) for key, pattern in INSTRUCTIONS.items()},
        }
        for name, kernel in kernels
    ]


if __name__ == "__main__":
    capability, *cases = sys.argv[1:]
    triton.runtime.driver.set_active(Target(int(capability)))
    print(json.dumps([kernel for case in cases for kernel in compiled(case)]))
