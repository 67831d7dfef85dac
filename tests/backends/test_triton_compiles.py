"""The Triton kernels compiled for GPUs, with or without one, at the sizes and with the cuts that are launched."""

import json
import os
import subprocess
import sys

import pytest
from paths import SUPPORT


pytest.importorskip("triton")

SHARED = {90: 227 * 1024, 80: 163 * 1024}  # bytes that a program may have
ROUTING = {"count", "place", "route_few"}
PRODUCTS = {"first_product", "scattered_product", "inner_gradient", "weight_gradient"}


@pytest.mark.parametrize(
    ("capability", "cases"),
    [
        (90, ["bfloat16:49152", "bfloat16:4096", "bfloat16:3", "float16:49152", "float32:4096", "float32:3"]),
        (80, ["bfloat16:49152", "bfloat16:3"]),
    ],
)
def test_compiles_and_fits(capability, cases, tmp_path):
    """Many rows per expert, fewer, and one token of three sub-tokens, of width 256, with 96 experts of size 512."""
    # in a process of its own, since the interpreter takes the place of the compiler when Triton is imported
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = SUPPORT / "compile_kernels.py"
    result = subprocess.run(
        [sys.executable, script, str(capability), *cases],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    kernels = json.loads(result.stdout)
    for case in cases:
        names = {kernel["name"] for kernel in kernels if f"{kernel['dtype']}:{kernel['tokens']}" == case}
        assert names - ROUTING == PRODUCTS
    for kernel in kernels:
        assert kernel["stack"] == 0, f"registers spill: {kernel}"
        assert kernel["shared"] <= SHARED[capability], kernel
        if kernel["name"] in PRODUCTS:
            assert kernel["copies"], f"no loads of 16 bytes ahead of their use: {kernel}"
        if kernel["name"] in PRODUCTS and kernel["dtype"] != "float32":
            large = kernel["tokens"] > 3 or kernel["name"] == "weight_gradient"  # blocks of 64 rows at least
            assert kernel["wgmma" if large and capability == 90 else "mma"], f"no tensor cores: {kernel}"
        if kernel["name"] in {"first_product", "inner_gradient"} and kernel["tokens"] == 49152 and capability == 90:
            assert 2 * kernel["threads"] * kernel["registers"] <= 65536, f"no two at a time: {kernel}"
            assert 2 * kernel["shared"] <= SHARED[90], f"no two at a time: {kernel}"
