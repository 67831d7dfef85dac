"""`mhmoe train` with DeepSpeed, two processes on the CPU, launched with the files in `examples/accelerate/`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch


pytest.importorskip("deepspeed")

from paths import ROOT, SUPPORT
from tiny import tiny_model, tiny_tokenizer
from training_runs import documents, logs_of, options, weights_of, write_jsonl
from transformers import AutoConfig

from mhmoe.conversion.layouts import Weights, training_layouts
from mhmoe.errors import UserError
from mhmoe.training.train_command import main


EXAMPLES = ROOT / "examples" / "accelerate"
RUN = {"max_steps": 4, "save_steps": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with a model, text, and `one`: a run on one process."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        tiny_model().save_pretrained("model")
        tiny_tokenizer().save_pretrained("model")
        write_jsonl(Path("train.jsonl"), documents(60))
        Path("validation.txt").write_text(documents(1, words=300)[0])
        main(options(output_dir="one", **RUN))
        yield folder


def launch(stage: int, output: str, **flags) -> None:
    arguments = options(output_dir=output, per_device_train_batch_size=2, use_cpu=None, **RUN, **flags)
    files = {"config_file": "deepspeed.yaml", "deepspeed_config_file": f"deepspeed_zero{stage}.json"}
    files = [part for name, file in files.items() for part in (f"--{name}", str(EXAMPLES / file))]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", *files]
    accelerate += ["--num_processes=2", "--main_process_port=0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(Path("cache").resolve())}
    subprocess.run([*accelerate, "-m", "mhmoe", "train", *arguments], check=True, env=environment)


@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_end_where_one_does(runs, stage):
    launch(stage, f"zero{stage}")
    Path(f"resumed{stage}").mkdir()
    shutil.copytree(f"zero{stage}/checkpoint-2", f"resumed{stage}/checkpoint-2")
    launch(stage, f"resumed{stage}", resume_from_checkpoint="true")
    expected = weights_of("one")
    for folder in (f"zero{stage}", f"resumed{stage}"):
        weights = weights_of(folder)
        assert weights.keys() == expected.keys()
        for name, weight in weights.items():
            assert (weight - expected[name]).abs().max() < 5e-5, name
        for key in ("eval_perplexity", "eval_tokens"):
            last, expected_last = (
                [entry[key] for entry in logs_of(run) if key in entry][-1] for run in (folder, "one")
            )
            assert last == pytest.approx(expected_last, rel=1e-4)
    hub = f"hub{stage}"
    script = EXAMPLES.parent / "hub_folder.py"
    subprocess.run([sys.executable, str(script), f"resumed{stage}/checkpoint-4", "model", hub], check=True)
    for name, weight in weights_of(hub).items():
        assert torch.equal(weight, weights_of(f"resumed{stage}")[name]), name
    with pytest.raises(UserError, match="DeepSpeed's own checkpoint; resume it as it was launched") as error:
        main(options(output_dir=f"resumed{stage}", resume_from_checkpoint="true", **RUN))
    assert "\n" not in str(error.value)


def test_states_are_as_planned(tmp_path):
    tiny_model(shared_expert_intermediate_size=16).save_pretrained(tmp_path / "model")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*torchrun, str(SUPPORT / "zero_bytes.py"), str(tmp_path / "model")], check=True, env=environment)
    weights = Weights.of(AutoConfig.from_pretrained(tmp_path / "model"))
    planned = training_layouts(weights, gpus=2, itemsize=4, activations=0)["ZeRO-3"]
    for found in json.loads((tmp_path / "model.json").read_text()):
        assert found == {kind: pytest.approx(getattr(planned, kind), rel=0.01) for kind in found}
