"""What is known of this processor, and which of its instructions torch's libraries may use."""

import os
import platform
from functools import cache
from pathlib import Path

import torch


LIBRARIES = ("ATEN_", "DNNL_", "MKL_", "ONEDNN_")  # what the names of variables that choose kernels begin with


@cache
def multiplies_tiles(dtype: torch.dtype) -> bool:
    """Whether oneDNN uses AMX, which the process may have told it not to."""
    limits = [value for name, value in variables().items() if name.endswith("MAX_CPU_ISA")]
    allowed = all("AMX" in limit.upper() or limit.upper() in ("ALL", "DEFAULT") for limit in limits)
    return dtype == torch.bfloat16 and instructions().endswith(" AMX") and allowed


def processor() -> str:
    """Its name, as the system tells it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def instructions() -> str:
    """The widest vectors that torch uses, and whether the processor multiplies tiles, or at least in bfloat16."""
    flags = _cpuinfo("flags").split()
    more = [name for flag, name in (("amx_tile", "AMX"), ("avx512_bf16", "BF16")) if flag in flags]
    return " ".join([torch.backends.cpu.get_cpu_capability(), *more[:1]])


def multiplies_bf16() -> bool:
    """Whether it has instructions for that; otherwise float32 is the faster dtype."""
    return instructions().endswith((" AMX", " BF16"))


def variables() -> dict[str, str]:
    """Those set that tell torch's libraries which instructions to use."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(LIBRARIES)}


def _cpuinfo(field: str) -> str:
    """Of the first core; empty where the system has no such file or field."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def refused() -> tuple[str, ...]:
    """Flags by which a C compiler leaves out instructions that the processor has, and torch was told not to use."""
    if "avx512f" in _cpuinfo("flags").split() and torch.backends.cpu.get_cpu_capability() != "AVX512":
        return ("-mno-avx512f",)
    if instructions().endswith(" AMX") and not multiplies_tiles(torch.bfloat16):
        return ("-mno-amx-tile",)
    return ()
