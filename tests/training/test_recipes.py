"""The recipes of `examples/`, on two processes; docs/scale.md's own commands run in tests/docs."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT
from tiny import tiny_model, tiny_tokenizer
from training_runs import documents, logs_of, options, weights_of, write_jsonl

from mhmoe.training.train_command import main


TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


@pytest.fixture
def environment(tmp_path, monkeypatch) -> dict[str, str]:
    """Of processes in a folder with a model and text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    tiny_model().save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    write_jsonl(Path("train.jsonl"), documents(60))
    Path("validation.txt").write_text(documents(1, words=300)[0])
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}


def test_generation_of_two_processes_is_that_of_one(environment):
    command = [str(ROOT / "examples/generate.py"), "model", "the cat sat", "--max_new_tokens", "12"]
    launch = [*TORCHRUN, "--standalone", "--nproc_per_node=2"]
    texts = [
        subprocess.run(words, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        for words in ([sys.executable, *command], [*launch, *command], [*launch, *command, "--expert_parallel"])
    ]
    assert texts[0].startswith("the cat sat")
    assert len(texts[0]) > len("the cat sat")
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize(
    ("fields", "processes", "arguments", "message"),
    [
        ({"num_key_value_heads": 1}, 2, [], "num_key_value_heads=1: does not divide by 2 processes; start 1"),
        ({}, 4, ["--expert_parallel"], "num_key_value_heads=2: does not divide by 4 processes; start 2"),
        (
            {"num_experts": 5},
            2,
            ["--expert_parallel"],
            "num_routed_experts=5: does not divide by 2 processes; start 1",
        ),
    ],
)
def test_generation_says_how_many_processes_would_do(environment, fields, processes, arguments, message):
    tiny_model(**fields).save_pretrained("model")
    one_of_them = {**environment, "WORLD_SIZE": str(processes)}  # and ends before it looks for others
    words = [sys.executable, str(ROOT / "examples/generate.py"), "model", "the cat sat", *arguments]
    ended = subprocess.run(words, env=one_of_them, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith(f"generate.py: error: {message}")
    assert "Traceback" not in ended.stderr


def test_two_nodes_end_where_one_process_does(environment):
    """Each is a torchrun of its own, as on two machines."""
    run = {"max_steps": 4, "save_steps": 2}
    main(options(output_dir="one", **run))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [
        *TORCHRUN,
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=127.0.0.1:{port}",
    ]
    layout = ["--distributed_config", '{"fsdp_size": 2, "ep_size": 2}']
    train = ["-m", "mhmoe", "train", *options(*layout, output_dir="nodes", per_device_train_batch_size=2, **run)]
    nodes = [
        subprocess.Popen([*launch, f"--node_rank={rank}", *train], env=environment, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    errors = [node.communicate(timeout=240)[1].decode() for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    for name, weight in weights_of("one").items():
        assert (weight - weights_of("nodes")[name]).abs().max() < 5e-5, name
    assert logs_of("nodes")[-1]["step"] == 4
