"""`mhmoe eval --backend vllm`: the accuracies of `--backend hf`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_model, tiny_tokenizer


pytest.importorskip("vllm.version")  # tests/vllm alone would pass for vllm

TASK = "mhmoe_smoke"
VLLM_ARGS = "enforce_eager=True,max_model_len=256"


def evaluate(folder: Path, output: Path, *arguments: str) -> tuple[dict, str]:
    command = [sys.executable, "-m", "mhmoe", "eval", folder, "--tasks", TASK, "--output_path", output, *arguments]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(max(output.rglob("results_*.json")).read_text()), run.stdout


def test_the_same_accuracies(smollm2, tmp_path):
    hf, _ = evaluate(smollm2, tmp_path / "hf", "--batch_size", "8", "--device", "cpu")
    vllm, printed = evaluate(
        smollm2, tmp_path / "vllm", "--backend", "vllm", "--batch_size", "auto", "--model_args", VLLM_ARGS
    )
    for metric in ("acc,none", "acc_norm,none"):
        assert vllm["results"][TASK][metric] == hf["results"][TASK][metric]
    assert hf["results"][TASK]["acc,none"] > 0.5  # of a model that knows something
    assert (hf["config"]["model"], vllm["config"]["model"]) == ("mhmoe", "vllm")
    assert "routing" in hf
    assert "routing" not in vllm
    assert "Routing: vLLM does not show" in printed


def test_a_model_that_vllm_refuses_is_one_line(tmp_path):
    tiny_model(use_bitnet=True).save_pretrained(tmp_path / "bitnet")
    tiny_tokenizer().save_pretrained(tmp_path / "bitnet")
    command = [sys.executable, "-m", "mhmoe", "eval", tmp_path / "bitnet", "--tasks", TASK, "--backend", "vllm"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    last = run.stderr.strip().splitlines()[-1]
    assert run.returncode != 0
    assert last.startswith("mhmoe: error: ")
    assert "use_bitnet=True" in last
