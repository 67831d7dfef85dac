"""`mhmoe plan`: what it foretells is what `mhmoe convert` makes, and it reads nothing but config and headers."""

import json
import os
import re
import shlex
import struct
from pathlib import Path

import pytest
from commands import assert_one_line, run
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
from safetensors.torch import load_file
from tiny import save_dense
from transformers import LlamaConfig

from mhmoe import cli, sources
from mhmoe.configuration import MHMoEConfig, costs
from mhmoe.conversion import checkpoint, convert
from mhmoe.conversion.plan import plan
from mhmoe.errors import UserError


def headers_of_llama_70b(folder: Path) -> Path:
    """A checkpoint of 138 GB that takes next to no room: the files are holes behind their headers."""
    folder.mkdir()
    d, inner, layers = 8192, 28672, 80
    shape = {"hidden_size": d, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 64}
    LlamaConfig(**shape, num_key_value_heads=8, dtype="bfloat16").save_pretrained(folder)
    layer = {"input_layernorm": [d], "post_attention_layernorm": [d]}
    layer |= {f"self_attn.{name}_proj": [1024 if name in "kv" else d, d] for name in "qkvo"}
    layer |= {"mlp.gate_proj": [inner, d], "mlp.up_proj": [inner, d], "mlp.down_proj": [d, inner]}
    shards = [
        {f"model.layers.{n}.{name}.weight": shape for n in range(first, first + 8) for name, shape in layer.items()}
        for first in range(0, layers, 8)
    ]
    shards[0] |= {"model.embed_tokens.weight": [32000, d], "lm_head.weight": [32000, d], "model.norm.weight": [d]}
    weight_map = {}
    for number, shapes in enumerate(shards):
        header, end = {}, 0
        for name, shape in shapes.items():
            begin, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        file = folder / f"model-{number}.safetensors"
        encoded = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(encoded)) + encoded)
        os.truncate(file, 8 + len(encoded) + end)
        weight_map |= dict.fromkeys(shapes, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_70b_from_headers(tmp_path):
    planned = plan(headers_of_llama_70b(tmp_path / "llama"))
    dense, exact, anchored, calibrated, random = planned.models
    assert planned.weight_files == 10
    assert dense.parameters == 68_976_648_192  # Llama 2 70B
    assert dense.disk_bytes == 2 * dense.parameters
    assert (
        dense.model_multiply_adds == dense.parameters - 32000 * 8192 - (2 * 80 + 1) * 8192
    )  # no norms, one embedding
    assert exact.sizes["shared_expert_intermediate_size"] == 28672
    assert anchored.sizes["shared_expert_intermediate_size"] == 28672 - 4096
    assert calibrated.ffn_multiply_adds == pytest.approx(dense.ffn_multiply_adds, rel=0.001)
    assert random.ffn_multiply_adds < calibrated.ffn_multiply_adds < anchored.ffn_multiply_adds
    assert exact.peak_memory_bytes < 6e9
    # 32,768 hidden states of 8,192 numbers, the embedding, and Gram matrices of 28,672 neurons and an FFN in float32
    assert calibrated.peak_memory_bytes == pytest.approx(
        0.5e9 + 5 * 1.07e9 + 0.52e9 + 2.82e9 + max(4 * 3.29e9, 5 * 2.82e9), rel=0.01
    )


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": True}], ids=str)
def test_exact_is_planned_as_it_is_made(tmp_path, overrides):
    source = save_dense(tmp_path / "dense", **overrides)
    sizes = {"num_moe_heads": 3, "num_experts": 6, "moe_intermediate_size": 16, "num_experts_per_tok": 3}
    exact = plan(source, **sizes).models[1]
    output = convert(source, tmp_path / "out", **sizes)
    config = MHMoEConfig.from_pretrained(output)
    counted = costs(config)
    assert (exact.parameters, exact.active_parameters) == (counted.parameters, counted.active_parameters)
    assert exact.ffn_multiply_adds == counted.ffn_multiply_adds
    assert {field: getattr(config, field) for field in exact.sizes} == exact.sizes
    assert exact.disk_bytes == sum(tensor.nbytes for tensor in load_file(output / "model.safetensors").values())
    assert 2 * plan(source, dtype="bfloat16", **sizes).models[1].disk_bytes == exact.disk_bytes


def test_match_dense(tmp_path):
    source = save_dense(tmp_path / "dense", hidden_size=48, intermediate_size=192)
    dense, calibrated, random = plan(source, match="dense").models
    assert (calibrated.name, random.name) == ("calibrated", "random")
    for solved in (calibrated, random):
        assert solved.ffn_multiply_adds == dense.ffn_multiply_adds  # 192 - 2 * 48 / 3 is a multiple of 8
    dense, given = plan(source, match="dense", shared_expert_intermediate_size=64).models
    assert given.ffn_multiply_adds == dense.ffn_multiply_adds
    assert given.sizes["moe_intermediate_size"] == (192 - 32 - 64) / 2


@pytest.mark.parametrize("match", ["dense", "smoe"])
def test_the_printed_commands_convert_to_what_was_planned(tmp_path, match, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = save_dense(tmp_path / "dense", intermediate_size=192)
    sizes = ("--num_experts_per_tok", 1, "--num_moe_heads", 4)
    capsys.readouterr()
    assert run(capsys, monkeypatch, "plan", "dense", "--match", match, *sizes)[0] == 0
    planned = plan("dense", match=match, num_experts_per_tok=1, num_moe_heads=4)
    fitting = {"dense": {"calibrated", "random"}, "smoe": {"exact", "anchored", "random"}}[match]
    assert planned.commands.keys() == fitting
    assert planned.unfit.keys() == {"exact", "anchored", "calibrated", "random"} - fitting
    text = tmp_path / "text.txt"
    text.write_text("Neurons that are missed least go first. " * 30)
    models = {model.name: model for model in planned.models}
    for name, command in planned.commands.items():
        assert f"--strategy {name} " in command
        words = shlex.split(command.replace("OUTPUT", name).replace("FILE", str(text)))
        words += ["--calibration_tokens", "600", "--distillation_steps=1"] if name == "calibrated" else []
        assert run(capsys, monkeypatch, *words[1:])[0] == 0
        report = json.loads((tmp_path / name / "conversion.json").read_text())
        assert report["sizes"] == models[name].sizes
        assert report["costs"]["mhmoe"]["ffn_multiply_adds"] == models[name].ffn_multiply_adds
        assert "--match" not in report["command"]  # the sizes are named instead
    for name, reason in planned.unfit.items():
        with pytest.raises(UserError, match=re.escape(reason)):
            convert(source, tmp_path / "out", strategy=name, match=match, num_experts_per_tok=1, num_moe_heads=4)
        assert f"{name} does not fit: {reason}" in planned.table()


def test_match_smoe(tmp_path):
    source = save_dense(
        tmp_path / "dense", hidden_size=768, intermediate_size=2048, num_hidden_layers=1, num_attention_heads=12
    )
    sizes = {"num_moe_heads": 3, "num_experts_per_tok": 3, "match": "smoe"}
    _, reference, *_, solved = plan(source, **sizes).models
    assert (reference.name, solved.name) == ("reference SMoE", "random")
    assert (solved.sizes["moe_intermediate_size"], solved.sizes["num_experts"]) == (512, 96)  # P2
    assert solved.ffn_multiply_adds == reference.ffn_multiply_adds
    assert solved.parameters == pytest.approx(reference.parameters, rel=0.05)
    shared = plan(source, **sizes, shared_expert_intermediate_size=2048).models
    assert [model.name for model in shared] == ["dense", "reference SMoE", "exact", "random"]
    assert shared[2].sizes == {**solved.sizes, "shared_expert_intermediate_size": 2048}
    assert shared[2].ffn_multiply_adds == shared[1].ffn_multiply_adds


def test_a_model_on_the_hub_is_not_downloaded(tmp_path, monkeypatch):
    source = save_dense(tmp_path / "dense")
    tensors = {
        name: TensorInfo(dtype="F32", shape=list(tensor.shape), data_offsets=(0, tensor.nbytes))
        for name, tensor in load_file(source / "model.safetensors").items()
    }
    here = plan(source)
    (source / "model.safetensors").unlink()
    metadata = SafetensorsFileMetadata(metadata={}, tensors=tensors)
    names = dict.fromkeys(tensors, "model.safetensors")
    repository = SafetensorsRepoMetadata(None, False, names, {"model.safetensors": metadata})
    patterns = []
    monkeypatch.setattr(
        sources, "snapshot_download", lambda *_, allow_patterns, **__: patterns.extend(allow_patterns) or source
    )
    monkeypatch.setattr(checkpoint, "get_safetensors_metadata", lambda *_, **__: repository)
    assert plan("someone/dense").models == here.models
    assert "*.json" in patterns
    assert not [pattern for pattern in patterns if "safetensors" in pattern]


def test_command(tmp_path, capsys, monkeypatch):
    source = save_dense(tmp_path / "dense")
    monkeypatch.setattr("sys.argv", ["mhmoe", "plan", str(source), "--json"])
    capsys.readouterr()
    cli.main()
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(plan(source).as_dict()))
    monkeypatch.setattr("sys.argv", ["mhmoe", "plan", str(source)])
    cli.main()
    table = capsys.readouterr().out
    assert f"mhmoe convert {source} OUTPUT --strategy exact\n" in table
    assert f"mhmoe convert {source} OUTPUT --strategy calibrated --calibration FILE\n" in table
    for model in plan(source).models:
        assert model.name in table
        assert f"{model.parameters:,}" in table or f"{model.parameters / 1e6:,.2f}M" in table
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


WRONG = {
    "heads do not divide": (("--num-moe-heads", 5), "num_moe_heads=5"),
    "no experts": (("--num-experts", 0), "num_experts=0"),
    "no inner size": (("--moe-intermediate-size", 0), "moe_intermediate_size=0"),
    "no parity with a full shared expert": (
        ("--match", "dense", "--shared-expert-intermediate-size", 96),
        "shared_expert_intermediate_size=96",
    ),
    "both given": (("--match", "dense", "--moe-intermediate-size", 8, "--shared-expert-intermediate-size", 8), "one"),
    "solved and given": (("--match", "smoe", "--num-experts", 8), "--num-experts"),
    "reference is too small": (("--match", "smoe", "--num-experts-per-tok", 20), "num_experts_per_tok=20"),
    "unknown match": (("--match", "magic"), "--match"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case, tmp_path, capsys, monkeypatch):
    arguments, named = WRONG[case]
    source = save_dense(tmp_path / "dense")
    capsys.readouterr()
    status, errors = run(capsys, monkeypatch, "plan", source, *arguments)
    assert_one_line(status, errors, named)
