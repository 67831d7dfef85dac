"""The two-minute benchmark says which backend to take."""

import os
import subprocess
import sys

import pytest
from benchmark_scripts import load_benchmark
from paths import ROOT


POINT = {"part": "block", "size": "head3", "dtype": "fp32", "tokens": 16, "mode": "forward"}


@pytest.fixture
def quick():
    return load_benchmark("quick")


def test_runs_as_a_program():
    tiny = ["--size", "smoe", "--tokens", "1", "2", "--dtypes", "fp32", "--budget", "0", "--threads", "1"]
    result = subprocess.run(
        [sys.executable, "benchmarks/quick.py", *tiny], cwd=ROOT, env=os.environ, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "1 threads" in lines[0]
    points = [line for line in lines if line.startswith("fp32, ")]
    assert [line.split(", ")[1:3][0] for line in points] == ["1 tokens", "2 tokens", "2 tokens"]
    assert all(float(cell) > 0 for line in points for cell in line.split()[-3:])
    assert lines[-1].endswith(("the default.", "5%."))


def test_the_default_is_advised_unless_another_is_clearly_faster(quick):
    near = {"subtoken": 2.0, "grouped_mm": 1.95, "batched_mm": 9.0}
    assert quick.advice([(POINT, near)]) == [
        "Take subtoken, the default: no other backend was faster here by more than 5%."
    ]
    far = [(POINT, near), (POINT | {"tokens": 2048, "mode": "both"}, {"subtoken": 3.0, "grouped_mm": 2.0})]
    first, rest = quick.advice(far)
    assert first.startswith("For training in fp32 (2048 tokens) take grouped_mm: 1.50 times as fast.")
    assert rest == "For everything else take subtoken, the default."


def test_the_table_leaves_out_what_was_not_run(quick):
    line = quick.table([(POINT, {"subtoken": 2.0, "grouped_mm": 1.5})])[-1]
    assert line.split() == ["fp32,", "16", "tokens,", "forward", "2.00", "1.50", "-"]
