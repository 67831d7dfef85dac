"""`mhmoe convert`: what is promised of a converted checkpoint, on tiny dense models."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import save_dense
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from mhmoe import modeling_mhmoe
from mhmoe.conversion import convert
from mhmoe.conversion.convert_command import main
from mhmoe.errors import UserError


SMALL = {"num_moe_heads": 4, "num_experts": 6, "moe_intermediate_size": 8}
DENSE_VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 16},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "yarn rope": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        }
    },
}


@pytest.fixture
def dense(tmp_path):
    return save_dense(tmp_path / "dense")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", DENSE_VARIANTS)
def test_exact_keeps_every_bit(tmp_path, variant, dtype):
    source = save_dense(tmp_path / "dense", dtype, max_shard_size="40KB", **DENSE_VARIANTS[variant])
    output = convert(source, tmp_path / "out", **SMALL)
    dense = AutoModelForCausalLM.from_pretrained(source).eval()
    mhmoe = AutoModelForCausalLM.from_pretrained(output).eval()
    assert mhmoe.dtype == dense.dtype == dtype
    assert mhmoe.config.model_type == "mhmoe"

    ids = torch.randint(3, 128, (3, 20), generator=torch.Generator().manual_seed(0))
    left, right = torch.ones_like(ids), torch.ones_like(ids)
    left[1, :7], right[2, 11:] = 0, 0
    for mask in (None, left, right):
        a, b = dense(ids, attention_mask=mask).logits, mhmoe(ids, attention_mask=mask).logits
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        assert torch.equal(a[real], b[real])
    greedy = {"attention_mask": left, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(dense.generate(ids, **greedy), mhmoe.generate(ids, **greedy))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_is_as_if_the_dense_model_were_loaded_in_it(tmp_path, dense, dtype):
    output = convert(dense, tmp_path / "out", dtype=dtype, **SMALL)
    ids = torch.arange(3, 40)[None]
    a = AutoModelForCausalLM.from_pretrained(dense, dtype=getattr(torch, dtype))(ids).logits
    b = AutoModelForCausalLM.from_pretrained(output)(ids).logits
    assert b.dtype == getattr(torch, dtype)
    assert torch.equal(a, b)


def test_start_values(tmp_path, dense):
    weights = load_file(convert(dense, tmp_path / "out", **SMALL) / "model.safetensors")
    for layer in range(2):
        mlp = f"model.layers.{layer}.mlp."
        assert not weights[mlp + "merge_layer.weight"].any()
        for name in ("head_layer.weight", "gate.weight", "experts.gate_up_proj", "experts.down_proj"):
            tensor = weights[mlp + name]
            assert tensor.count_nonzero() == tensor.numel()
            assert abs(tensor.mean()) < 4 * tensor.std() / tensor.numel() ** 0.5
        experts = weights[mlp + "experts.gate_up_proj"]
        assert len({tuple(expert.flatten().tolist()) for expert in experts}) == 6
    assert not torch.equal(weights["model.layers.0.mlp.gate.weight"], weights["model.layers.1.mlp.gate.weight"])


def test_seed_decides_the_bytes(tmp_path, dense):
    def file_bytes(name, **options):
        return (convert(dense, tmp_path / name, **SMALL, **options) / "model.safetensors").read_bytes()

    assert file_bytes("a", seed=1) == file_bytes("b", seed=1)
    assert file_bytes("c", seed=2) != file_bytes("d", seed=1)


def test_sharding_changes_no_tensor(tmp_path, dense):
    whole = load_file(convert(dense, tmp_path / "whole", **SMALL) / "model.safetensors")
    output = convert(dense, tmp_path / "sharded", max_shard_size="20KB", **SMALL)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for name, file in index["weight_map"].items():
        with safe_open(output / file, "pt") as shard:
            assert torch.equal(shard.get_tensor(name), whole[name])
            assert shard.metadata() == {"format": "pt"}
    AutoModelForCausalLM.from_pretrained(output)


def test_every_mhmoe_parameter_moves_in_training(tmp_path, dense):
    model = AutoModelForCausalLM.from_pretrained(convert(dense, tmp_path / "out", **SMALL)).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        ids = torch.randint(3, 128, (4, 32), generator=generator)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            assert (parameter != before[name]).flatten(1).any(dim=1).all(), name  # every expert of the layer
        assert not torch.equal(parameter, before[name]), name


def test_folder_holds_what_the_source_had(tmp_path, dense):
    (dense / "generation_config.json").write_text('{"max_new_tokens": 7, "transformers_version": "5.0.0"}\n')
    (dense / "additional_chat_templates").mkdir()
    (dense / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    (dense / "training_args.bin").write_bytes(b"not ours")
    output = convert(dense, tmp_path / "out", **SMALL)
    copied = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE", "generation_config.json"]
    for name in [*copied, "additional_chat_templates/rag.jinja"]:
        assert (output / name).read_bytes() == (dense / name).read_bytes(), name
    made = {"model.safetensors", "config.json", "README.md", "conversion.json"}
    code = {path.name for path in Path(modeling_mhmoe.__file__).parent.glob("[a-z]*.py")}
    assert {path.name for path in output.iterdir()} == made | code | set(copied) | {"additional_chat_templates"}
    assert AutoTokenizer.from_pretrained(output).chat_template == AutoTokenizer.from_pretrained(dense).chat_template


def test_report_and_card(tmp_path, dense):
    output = convert(dense, tmp_path / "out", seed=3, base_model="someone/tiny", **SMALL)
    report = json.loads((output / "conversion.json").read_text())
    assert report["sizes"] == {**SMALL, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 96}
    assert set(report["source"]["sha256"]) == {"config.json", "model.safetensors"}
    assert report["versions"]["mhmoe"]

    card = ModelCard.load(output / "README.md")
    metadata = card.data.to_dict()
    assert metadata["base_model"] == "someone/tiny"
    assert metadata["base_model_relation"] == "finetune"
    assert metadata["license"] == "apache-2.0"
    assert metadata["pipeline_tag"] == "text-generation"
    assert metadata["library_name"] == "transformers"
    assert "mhmoe" in metadata["tags"]
    model = AutoModelForCausalLM.from_pretrained(output)
    parameters = f"{sum(parameter.numel() for parameter in model.parameters()):,}"
    for fact in (
        report["command"],
        "Not trained after conversion",
        "seed 3",
        parameters,
        *report["source"]["sha256"].values(),
    ):
        assert fact in card.text, fact


def test_command_on_the_card_makes_the_same_weights(tmp_path, dense, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the command has the folders' names alone
    output = convert(dense, tmp_path / "out", seed=5, **SMALL)
    before = (output / "model.safetensors").read_bytes()
    command = shlex.split(json.loads((output / "conversion.json").read_text())["command"])
    assert command[:2] == ["mhmoe", "convert"]
    main([*command[2:], "--overwrite"])
    assert (output / "model.safetensors").read_bytes() == before


def test_base_model_defaults(tmp_path, dense, capsys):
    def base_model_of(source, **options):
        output = convert(source, tmp_path / "out", overwrite=True, **SMALL, **options)
        report = json.loads((output / "conversion.json").read_text())
        metadata = ModelCard.load(output / "README.md").data.to_dict()
        assert metadata.get("base_model") == report["base_model"]
        assert ("base_model_relation" in metadata) == ("base_model" in metadata)
        said = [line for line in capsys.readouterr().out.splitlines() if "base_model" in line]
        assert len(said) == (report["base_model"] is None)
        return report["base_model"]

    config, card = json.loads((dense / "config.json").read_text()), (dense / "README.md").read_text()
    assert base_model_of(dense) is None
    assert base_model_of(dense, base_model="own/choice") == "own/choice"
    for path in ("/abs/olute", "relative", str(dense), "../dense", None, 7):
        (dense / "config.json").write_text(json.dumps({**config, "_name_or_path": path}))
        assert base_model_of(dense) is None
    (dense / "config.json").write_text(json.dumps({**config, "_name_or_path": "loaded/from"}))
    assert base_model_of(dense) == "loaded/from"
    (dense / "README.md").write_text(card.replace("license:", "base_model:\n- /tmp/x\n- its/base\nlicense:"))
    assert base_model_of(dense) == "its/base"
    (dense / "README.md").write_text(card.replace("license:", "base_model: its/base\nmodel_id: its/own\nlicense:"))
    assert base_model_of(dense) == "its/own"
    with pytest.raises(UserError, match="--base-model '/tmp/x': no id"):
        convert(dense, tmp_path / "out2", base_model="/tmp/x")
    cached = tmp_path / "models--org--name" / "snapshots" / "0123"
    cached.parent.mkdir(parents=True)
    dense.rename(cached)
    output = convert(cached, tmp_path / "out2", **SMALL)
    assert ModelCard.load(output / "README.md").data.base_model == "org/name"


def test_default_sizes(tmp_path):
    source = save_dense(tmp_path / "dense", hidden_size=54, num_attention_heads=9, num_key_value_heads=3)
    config = AutoModelForCausalLM.from_pretrained(convert(source, tmp_path / "out")).config
    assert config.num_moe_heads == 3  # 4 does not divide 54
    assert config.shared_expert_intermediate_size == 96
    assert config.moe_intermediate_size >= 54 / 6
    assert config.num_experts == 32


def test_tensors_that_old_checkpoints_carry_are_dropped(tmp_path, dense):
    weights = load_file(dense / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(weights, dense / "model.safetensors", {"format": "pt"})
    output = convert(dense, tmp_path / "out", **SMALL)
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in load_file(output / "model.safetensors")


def test_existing_output_is_left_alone(tmp_path, dense):
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match=r"exists already.*--overwrite"):
        convert(dense, output, **SMALL)
    with pytest.raises(UserError, match=r"config\.json"):
        convert(dense, output, overwrite=True, **SMALL)
    assert [path.name for path in output.iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match="source itself"):
        convert(dense, dense, overwrite=True, **SMALL)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="source itself"):
        convert(dense, tmp_path, overwrite=True, **SMALL)
    assert (dense / "model.safetensors").is_file()


def test_overwrite_replaces_only_in_the_end(tmp_path, dense):
    output = convert(dense, tmp_path / "out", seed=1, **SMALL)
    first = (output / "model.safetensors").read_bytes()
    broken = shutil.copytree(dense, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((dense / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError):
        convert(broken, output, overwrite=True, **SMALL)
    assert (output / "model.safetensors").read_bytes() == first
    convert(dense, output, seed=2, overwrite=True, **SMALL)
    assert (output / "model.safetensors").read_bytes() != first
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "broken", "out"}


def test_a_failure_while_writing_leaves_nothing(tmp_path, dense, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mhmoe.conversion.writer._write_shard", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        convert(dense, tmp_path / "new" / "deep" / "out", **SMALL)
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}


def test_a_disk_that_is_too_small_is_noticed_first(tmp_path, dense, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match="free"):
        convert(dense, tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()


def test_other_heads_are_refused_by_name(tmp_path):
    config = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(UserError, match=r"score\.weight"):
        convert(tmp_path / "dense", tmp_path / "out")


def test_all_missing_tensors_are_reported_at_once(tmp_path, dense):
    weights = load_file(dense / "model.safetensors")
    for name in ("lm_head.weight", "model.layers.1.mlp.up_proj.weight"):
        del weights[name]
    save_file(weights, dense / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lm_head\.weight, model\.layers\.1\.mlp\.up_proj\.weight"):
        convert(dense, tmp_path / "out", **SMALL)


def test_config_that_does_not_fit_the_tensors(tmp_path, dense):
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(UserError, match=r"gate_proj.*\(96, 48\).*\(64, 48\)"):
        convert(dense, tmp_path / "out", **SMALL)


def test_llama_class_is_not_needed_to_have_lm_head_in_the_file(tmp_path):
    # tied weights may be stored under either name
    source = save_dense(tmp_path / "dense", tie_word_embeddings=True)
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    output = convert(source, tmp_path / "out", **SMALL)
    ids = torch.arange(3, 30)[None]
    a = LlamaForCausalLM.from_pretrained(source)(ids).logits
    assert torch.equal(a, AutoModelForCausalLM.from_pretrained(output)(ids).logits)
