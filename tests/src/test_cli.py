"""The command line as a user meets it: every mistake gives one line, a non-zero exit, no traceback and no folder."""

import errno
import importlib.metadata
import json
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
import transformers
from commands import assert_one_line, run
from safetensors.torch import load_file, save_file
from tiny import save_dense

from mhmoe import __version__, cli


def truncated(source):
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])


def garbage(source):
    (source / "model.safetensors").write_bytes(b"\xff" * 4096)


def pickled(source):
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()


def edit_config(**fields):
    def edit(source):
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, **fields}))

    return edit


def missing_shard(source):
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    (source / "model.safetensors").unlink()


def emptied(source):
    for path in source.iterdir():
        path.unlink()


def integer_weights(source):
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int8)
    save_file(weights, source / "model.safetensors")


def no_tensors(source):
    save_file({}, source / "model.safetensors")


BROKEN_SOURCES = {
    "empty folder": (emptied, "config.json"),
    "truncated": (truncated, "model.safetensors"),
    "garbage": (garbage, "model.safetensors"),
    "zero bytes": (lambda source: (source / "model.safetensors").write_bytes(b""), "model.safetensors"),
    "missing shard": (missing_shard, "model-00001-of-00002.safetensors"),
    "pickle": (pickled, "pytorch_model.bin"),
    "config is no JSON": (lambda source: (source / "config.json").write_text("{model"), "config.json"),
    "config is a list": (lambda source: (source / "config.json").write_text("[]"), "config.json"),
    "config is binary": (lambda source: (source / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json"),
    "config has a wrong type": (edit_config(hidden_size="large"), "hidden_size"),
    "config has a zero": (edit_config(num_attention_heads=0), "config.json"),
    "config has a wrong size": (edit_config(num_hidden_layers=3), "model.layers.2"),
    "another architecture": (edit_config(model_type="gpt2"), "gpt2"),
    "no architecture": (edit_config(model_type=None), "model_type"),
    "quantized": (edit_config(quantization_config={"quant_method": "gptq"}), "quantization_config"),
    "type is a number": (edit_config(dtype=5), "config.json"),
    "padding out of the vocabulary": (edit_config(pad_token_id=500), "config.json"),
    "other tensors": (edit_config(head_dim=20), "self_attn.k_proj.weight"),
    "config without end": (lambda source: (source / "config.json").write_text("[" * 5000), "config.json"),
    "no tensors": (no_tensors, "hold no tensors"),
    "integers": (integer_weights, "model.norm.weight"),
}
WRONG_ARGUMENTS = {
    "heads do not divide": (("--num-moe-heads", 5), "num_moe_heads=5"),
    "no heads": (("--num-moe-heads", 0), "num_moe_heads=0"),
    "one head": (("--num-moe-heads", 1), "--num-moe-heads 1"),
    "negative heads": (("--num-moe-heads", -4), "num_moe_heads=-4"),
    "more chosen than experts": (("--num-experts", 2, "--num-experts-per-tok", 3), "num_experts_per_tok=3"),
    "zero experts": (("--num-experts", 0), "num_experts=0"),
    "zero chosen": (("--num-experts-per-tok", 0), "num_experts_per_tok=0"),
    "zero inner size": (("--moe-intermediate-size", 0), "moe_intermediate_size=0"),
    "no number": (("--num-experts", "many"), "--num-experts"),
    "dtype": (("--dtype", "int8"), "--dtype"),
    "strategy": (("--strategy", "magic"), "--strategy"),
    "shard size": (("--max-shard-size", "huge"), "max_shard_size='huge'"),
    "unknown flag": (("--num-expert-heads", 4), "--num-expert-heads"),
}


@pytest.mark.parametrize("case", BROKEN_SOURCES)
def test_broken_source(case, tmp_path, capsys, monkeypatch):
    breaks, named = BROKEN_SOURCES[case]
    source = save_dense(tmp_path / "dense")
    breaks(source)
    for command in (("convert", source, tmp_path / "out"), ("plan", source)):
        status, errors = run(capsys, monkeypatch, *command)
        assert_one_line(status, errors, named)
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}


def test_no_weights(tmp_path, capsys, monkeypatch):
    """They are missing to convert; the config alone is enough for a plan."""
    source = save_dense(tmp_path / "dense")
    (source / "model.safetensors").unlink()
    assert_one_line(*run(capsys, monkeypatch, "convert", source, tmp_path / "out"), "model.safetensors")
    assert run(capsys, monkeypatch, "plan", source)[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}


@pytest.mark.parametrize("case", WRONG_ARGUMENTS)
def test_wrong_arguments(case, tmp_path, capsys, monkeypatch):
    arguments, named = WRONG_ARGUMENTS[case]
    source = save_dense(tmp_path / "dense")
    capsys.readouterr()
    status, errors = run(capsys, monkeypatch, "convert", source, tmp_path / "out", *arguments)
    assert_one_line(status, errors, named)
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}


def test_a_name_with_line_breaks_is_told_in_one_line(tmp_path, capsys, monkeypatch):
    status, errors = run(capsys, monkeypatch, "convert", "no\nwhere\u2028", tmp_path / "out")
    assert_one_line(status, errors, "no where : no such")


@pytest.mark.parametrize("source", ["nowhere/at/all", "nowhere", "not a name!"])
def test_no_such_source(source, tmp_path, capsys, monkeypatch):
    status, errors = run(capsys, monkeypatch, "convert", source, tmp_path / "out")
    assert_one_line(status, errors, source)
    assert not list(tmp_path.iterdir())


def test_source_is_a_file(tmp_path, capsys, monkeypatch):
    source = save_dense(tmp_path / "dense")
    status, errors = run(capsys, monkeypatch, "convert", source / "config.json", tmp_path / "out")
    assert_one_line(status, errors, "config.json")


def test_existing_output(tmp_path, capsys, monkeypatch):
    source = save_dense(tmp_path / "dense")
    (tmp_path / "out").mkdir()
    status, errors = run(capsys, monkeypatch, "convert", source, tmp_path / "out")
    assert_one_line(status, errors, "--overwrite")


@pytest.mark.parametrize("arguments", [("explode",), ("convert",), ("convert", "a"), ("verify", "a", "b", "--nope")])
def test_usage(arguments, capsys, monkeypatch):
    status, errors = run(capsys, monkeypatch, *arguments)
    assert_one_line(status, errors, "mhmoe")


def test_help(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mhmoe"])
    cli.main()
    printed = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert command in printed


def test_versions(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mhmoe", "--version"])
    cli.main()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"mhmoe {__version__} (transformers {transformers.__version__}, torch {version('torch')}, ")


def test_versions_where_something_is_missing(capsys, monkeypatch):
    def version(package):
        if package == "torch":
            raise importlib.metadata.PackageNotFoundError
        return "5.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert "(transformers 5.0, torch not installed, Python " in cli.versions()


def test_progress_and_result(tmp_path, capsys, monkeypatch):
    source = save_dense(tmp_path / "dense")
    monkeypatch.setattr(sys, "argv", ["mhmoe", "convert", str(source), str(tmp_path / "out")])
    cli.main()
    printed = capsys.readouterr()
    assert "Converting dense" in printed.err  # the progress bar
    assert str(tmp_path / "out") in printed.out


def test_what_the_machine_refuses_is_one_line(capsys, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device", "/there/file")

    monkeypatch.setattr("mhmoe.params_command.main", full)
    status, errors = run(capsys, monkeypatch, "params")
    assert_one_line(status, errors, "/there/file: the disk is full")

    def other(_):
        raise OSError("a fault of the program")

    monkeypatch.setattr("mhmoe.params_command.main", other)
    with pytest.raises(OSError, match="a fault of the program"):
        run(capsys, monkeypatch, "params")


def test_whoever_reads_may_stop():
    program = "import mhmoe.params_command as c, mhmoe.cli as cli, sys\n"
    program += "c.main = lambda _: print('line\\n' * 100_000)\nsys.argv = ['mhmoe', 'params']\ncli.main()"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1


def test_as_a_program():
    program = [sys.executable, "-m", "mhmoe"]
    done = subprocess.run([*program, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"mhmoe {__version__} (")
    done = subprocess.run([*program, "explode"], capture_output=True, text=True)
    assert done.returncode == 1
    assert_one_line(done.returncode, done.stderr, "explode")
