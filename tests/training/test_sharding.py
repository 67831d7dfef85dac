"""`mhmoe train` on two processes that share out the model, and its checkpoints on any number of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paths import ROOT, SUPPORT
from sharded_runs import LAYOUTS, RESUMED, resume, train
from tiny import tiny_model, tiny_tokenizer
from training_runs import documents, logs_of, options, weights_of, write_jsonl

from mhmoe.errors import UserError
from mhmoe.training.sharding import regrouped


TOLERANCE = 5e-5  # AdamW's steps are as long for the smallest gradients, which float32 sums give in another order


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folder with all runs of `sharded_runs`, and `one`, on one process."""
    folder = tmp_path_factory.mktemp("runs")
    cache = str(folder / "cache")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
        tiny_model().save_pretrained("model")
        tiny_tokenizer().save_pretrained("model")
        write_jsonl(Path("train.jsonl"), documents(60))
        Path("validation.txt").write_text(documents(1, words=300)[0])
        train("one", per_device_train_batch_size=4)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        subprocess.run(
            [*launch, str(SUPPORT / "sharded_runs.py"), str(folder)],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": cache},
        )
        yield folder


def assert_same_run(folder: str, expected: str) -> None:
    weights, expected_weights = weights_of(folder), weights_of(expected)
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        assert (weight - expected_weights[name]).abs().max() < TOLERANCE, name
    last, expected_last = (
        [entry for entry in logs_of(run) if "eval_perplexity" in entry][-1] for run in (folder, expected)
    )
    for key in ("step", "eval_tokens", "eval_perplexity", "eval_token_accuracy"):
        assert last[key] == pytest.approx(expected_last[key], rel=1e-4), key


@pytest.mark.parametrize("run", [*LAYOUTS, *(f"{layout}-after-{source}" for source, layout in RESUMED)])
def test_two_processes_end_where_one_does(runs, run):
    assert_same_run(run, "one")


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "accelerate-sharded"])
def test_one_process_resumes_what_two_began(runs, layout):
    checkpoint = runs / layout / "checkpoint-2"
    ordinary = {path.name for path in (runs / "one" / "checkpoint-2").iterdir()} - {"rng_state.pth"}
    assert {path.name for path in checkpoint.iterdir()} == ordinary | {"rng_state_0.pth", "rng_state_1.pth"}
    resume(layout, f"one-after-{layout}", per_device_train_batch_size=4)
    assert_same_run(f"one-after-{layout}", "one")


def test_a_hub_folder_of_a_sharded_checkpoint(runs):
    Path("model/LICENSE").write_text("as you like")
    command = [sys.executable, str(ROOT / "examples/hub_folder.py")]
    subprocess.run([*command, "accelerate-sharded/checkpoint-4", "model", "hub"], check=True)
    weights = weights_of("hub")
    for name, weight in weights_of("accelerate-sharded").items():
        assert torch.equal(weights[name], weight), name
    saved = {path.name for path in Path("hub").iterdir()}
    assert {"config.json", "tokenizer.json", "modeling_mhmoe.py", "model.safetensors", "LICENSE"} <= saved
    for checkpoint, message in (("one/checkpoint-2", "no checkpoint of FSDP2"), ("x", "hub: exists; choose another")):
        refused = subprocess.run(
            [*command, checkpoint, "model", "hub" if checkpoint == "x" else "other"], capture_output=True, text=True
        )
        assert refused.returncode != 0
        assert message in refused.stderr.splitlines()[-1]
    assert not Path("other").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"distributed_config": "absent.json"}, "distributed_config=absent.json: cannot be used"),
        ({"distributed_config": '{"fsdp": 2}'}, "cannot be used (DistributedConfig"),
        ({"distributed_config": "[2]"}, "cannot be used"),
        ({"distributed_config": '{"a": ' * 99 + "1" + "}" * 99}, "is nested deeper than 64"),
        ({"distributed_config": "model"}, "is a folder, not a file"),
        ({"distributed_config": '{"fsdp_size": 0}'}, "cannot be used (Parallelism sizes must be >= 1, got 0.)"),
        ({"distributed_config": '{"fsdp_size": 2}'}, "its sizes make 2 processes, but 1 were launched"),
        ({"fsdp": True}, "Using fsdp only works in distributed training"),
        ({"resume_from_checkpoint": "accelerate-sharded/checkpoint-2"}, "FSDP's own checkpoint; resume it with FSDP"),
    ],
)
def test_mistakes_get_one_line(runs, flags, message):
    with pytest.raises(UserError) as error:
        train("refused", **flags)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path("refused").exists()


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
FSDP2 = ROOT / "examples" / "accelerate" / "fsdp2.yaml"


@pytest.mark.parametrize(
    ("launch", "arguments", "message"),
    [
        (
            TORCHRUN,
            ["--fsdp"],
            "fsdp: was asked for, but accelerate would give each of these processes the whole model",
        ),
        (
            ["accelerate.commands.launch", "--config_file", str(FSDP2), "--num_processes=2", "--main_process_port=0"],
            [],
            "fsdp: was asked for",
        ),
        (TORCHRUN, ["--distributed_config", '{"tp_size": 2}'], "accelerate trains with tensor parallelism on"),
    ],
    ids=["flag", "configuration of accelerate", "tensor parallelism"],
)
def test_what_accelerate_does_not_do_on_cpus_gets_one_line(runs, launch, arguments, message):
    result = subprocess.run(
        [sys.executable, "-m", *launch, "-m", "mhmoe", "train", *options(*arguments, output_dir="refused")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(runs / "cache")},
    )
    assert result.returncode != 0
    lines = {line for line in result.stderr.splitlines() if line.startswith("mhmoe: error: ")}
    assert any(message in line for line in lines), result.stderr
    assert not Path("refused").exists()


def test_states_are_regrouped_by_parameter():
    parameters = [torch.nn.Parameter(torch.full((2,), float(number))) for number in range(4)]
    groups = [{"params": parameters[:3], "weight_decay": 0.1}, {"params": parameters[3:], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    sum((number * parameter).sum() for number, parameter in enumerate(parameters) if number).backward()  # 0 has none
    optimizer.step()
    state, schedule = regrouped(optimizer.state_dict(), scheduler.state_dict(), [[2], [0, 1], [3], []])
    assert [group["params"] for group in state["param_groups"]] == [[0], [1, 2], [3], []]
    assert [group["weight_decay"] for group in state["param_groups"]] == [0.1, 0.1, 0.0, 0.0]
    means = {number: values["exp_avg"][0].item() for number, values in state["state"].items()}
    assert means == pytest.approx({0: 0.2, 2: 0.1, 3: 0.3})
    assert len(schedule["base_lrs"]) == len(schedule["lr_lambdas"]) == 4
