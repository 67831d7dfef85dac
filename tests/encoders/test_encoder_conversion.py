"""`mhmoe plan`, `convert` and `verify` of dense encoders, on tiny ones."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer
from tiny_encoders import TINY
from torch.utils._pytree import tree_leaves
from transformers import AutoModel, ViTModel

import mhmoe
from mhmoe.conversion import convert, keep_figures, plan, verify
from mhmoe.errors import UserError


SMALL = {"num_experts": 6, "moe_intermediate_size": 16}


def save_dense(name: str, folder: Path, dtype: torch.dtype = torch.float32, **fields) -> Path:
    tiny = TINY[name]
    replace(tiny, fields={**tiny.fields, **fields}).make(dense=True).to(dtype).save_pretrained(folder)
    return folder


def said(model, **inputs) -> list[torch.Tensor]:
    torch.manual_seed(0)  # ViLT draws among patches
    with torch.no_grad():
        outputs = model(**inputs)
    return [value for value in tree_leaves(dict(outputs)) if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("name", TINY)
def test_exact_keeps_every_bit(name, tmp_path):
    tiny = TINY[name]
    source = save_dense(name, tmp_path / "dense")
    output = convert(source, tmp_path / "out", **SMALL)
    twin, loading = tiny.model_class.from_pretrained(output, output_loading_info=True)
    assert not any(loading.values())
    assert sum(module.endswith(".moe") for module, _ in twin.named_modules()) > 0
    dense = tiny.dense_class.from_pretrained(source)
    inputs = tiny.inputs()
    # copies: where a file's tensor begins in memory decides on some processors how a product with one output is summed
    dense, twin = copy.deepcopy(dense.eval()), copy.deepcopy(twin.eval())
    outputs = list(zip(said(dense, **inputs), said(twin, **inputs), strict=True))
    assert outputs
    assert all(torch.equal(one, other) for one, other in outputs)
    # what the dense model had is there to the byte, under the names it had
    before, after = (load_file(folder / "model.safetensors") for folder in (source, output))
    assert all(torch.equal(before[tensor], after[tensor]) for tensor in before)
    assert verify(source, output).broken_promises == []


def test_experts_of_two_towers_start_differently(tmp_path):
    output = convert(save_dense("clip", tmp_path / "dense"), tmp_path / "out", **SMALL)
    tensors = [tensor for key, tensor in load_file(output / "model.safetensors").items() if key.endswith("up_proj")]
    assert len(tensors) == 4
    assert not any(torch.equal(tensors[0], other) for other in tensors[1:])


def test_half_precision(tmp_path):
    source = save_dense("vit", tmp_path / "dense", torch.bfloat16)
    verification = verify(source, convert(source, tmp_path / "out", **SMALL))
    assert (verification.dtype, verification.max_difference, verification.pictures) == ("bfloat16", 0.0, 2)
    as_float32 = convert(source, tmp_path / "float32", dtype="float32", **SMALL)
    assert {tensor.dtype for tensor in load_file(as_float32 / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("name", ["modernbert", "dinov3_vit-gated"])
def test_anchored_where_the_ffn_is_gated(name, tmp_path):
    source = save_dense(name, tmp_path / "dense")
    output = convert(source, tmp_path / "out", strategy="anchored", **SMALL)
    config = json.loads((output / "config.json").read_text())
    assert config["shared_expert_intermediate_size"] == 48 - 32 // 2
    verification = verify(source, output)
    assert 0 < verification.max_difference < 2e-4
    assert verification.broken_promises == []
    twin = TINY[name].model_class.from_pretrained(output)
    twin(**TINY[name].inputs())[0].square().mean().backward()
    block = next(module for module_name, module in twin.named_modules() if module_name.endswith(".moe"))
    for part in (block.head_layer.weight, block.merge_layer.weight, block.experts.down_proj):
        assert part.grad.abs().max() > 0


def test_random_takes_the_ffns_of_both_encoders_apart(tmp_path):
    source = save_dense("git", tmp_path / "dense")
    output = convert(source, tmp_path / "out", strategy="random", **SMALL)
    before, after = (load_file(folder / "model.safetensors").keys() for folder in (source, output))
    assert len(before - after) == 2 * 4 + 2 * 4
    assert verify(source, output).broken_promises == []


def test_random(tmp_path):
    source = save_dense("bert", tmp_path / "dense")
    output = convert(source, tmp_path / "out", strategy="random", **SMALL)
    before, after = (load_file(folder / "model.safetensors").keys() for folder in (source, output))
    gone = {
        name for name in before if ".intermediate." in name or ("output.dense" in name and "attention" not in name)
    }
    assert before - after == gone
    assert len(gone) == 2 * 4
    assert verify(source, output).broken_promises == []


def test_converting_is_repeatable_and_can_go_on(tmp_path):
    source = save_dense("vit", tmp_path / "dense")
    first = convert(source, tmp_path / "out", **SMALL)
    digest = (first / "model.safetensors").read_bytes()
    assert convert(source, first, resume=True, **SMALL) == first
    second = convert(source, tmp_path / "out", overwrite=True, **SMALL)
    assert (second / "model.safetensors").read_bytes() == digest
    third = convert(source, tmp_path / "seeded", seed=1, **SMALL)
    assert (third / "model.safetensors").read_bytes() != digest


def test_the_folder_has_code_processor_card_and_report(tmp_path):
    source = save_dense("bert", tmp_path / "dense", vocab_size=128)
    tiny_tokenizer().save_pretrained(source)
    (source / "processor_config.json").write_text('{"processor_class": "X", "auto_map": {"AutoProcessor": "x.X"}}')
    small = {"preprocessor_config.json": "{}", "modules.json": "[]", "1_Pooling/config.json": "{}", "vocab.txt": "a\n"}
    for name, content in small.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(content)
    output = convert(source, tmp_path / "out", base_model="someone/tiny-bert", **SMALL)
    for name, content in small.items():
        assert (output / name).read_text() == content
    assert json.loads((output / "processor_config.json").read_text()) == {"processor_class": "X"}
    assert (output / "modeling_mhmoe_encoders.py").is_file()
    assert not (output / "generation_config.json").exists()
    assert "mhmoe.modeling_mhmoe" not in (output / "layer.py").read_text()
    keep_figures(verify(source, output), output)
    card = ModelCard.load(output / "README.md")
    assert card.data.pipeline_tag == "fill-mask"
    assert "AutoModelForMaskedLM.from_pretrained" in card.text
    assert "0 pictures" in card.text
    report = json.loads((output / "conversion.json").read_text())
    parameters = [sum(tensor.numel() for tensor in folder) for folder in map(parameters_of, (source, output))]
    assert [report["costs"][name]["parameters"] for name in ("dense", "mhmoe")] == parameters
    assert report["verification"]["max_difference"] == 0


@pytest.mark.parametrize(
    ("name", "auto_class", "tag"),
    [
        ("dinov3_vit", "AutoModel", "image-feature-extraction"),
        ("clip", "AutoModelForZeroShotImageClassification", "zero-shot-image-classification"),
        ("git", "AutoModelForImageTextToText", "image-text-to-text"),
    ],
)
def test_the_card_names_task_and_auto_class(name, auto_class, tag, tmp_path):
    card = ModelCard.load(convert(save_dense(name, tmp_path / "dense"), tmp_path / "out", **SMALL) / "README.md")
    assert card.data.pipeline_tag == tag
    assert f"model = {auto_class}.from_pretrained" in card.text


def parameters_of(folder: Path) -> list[torch.Tensor]:
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    twin = getattr(mhmoe, f"MHMoE{name.removeprefix('MHMoE')}")
    return list((twin if name.startswith("MHMoE") else twin.dense).from_pretrained(folder).parameters())


def test_plan_counts_what_convert_makes(tmp_path):
    source = save_dense("vit", tmp_path / "dense")
    planned = plan(source, **SMALL)
    assert [model.name for model in planned.models] == ["dense", "exact", "random"]
    assert set(planned.unfit) == {"anchored", "calibrated"}
    assert (planned.model_type, planned.num_hidden_layers, planned.hidden_size) == ("vit", 2, 32)
    for model in planned.models[1:]:
        output = convert(source, tmp_path / model.name, strategy=model.name, **SMALL)
        assert model.parameters == sum(tensor.numel() for tensor in load_file(output / "model.safetensors").values())
    # per token: 2 d^2 + 2 d k i for the routed part, 2 d ff for the shared one
    dense, exact, random = (model.ffn_multiply_adds for model in planned.models)
    assert dense == 2 * 2 * 32 * 48
    assert random == 2 * (2 * 32**2 + 2 * 32 * 2 * 16)
    assert exact == dense + random
    assert "random" in planned.table()


def test_plan_of_several_encoders(tmp_path):
    planned = plan(save_dense("clip", tmp_path / "dense"), **SMALL)
    assert (planned.model_type, planned.num_hidden_layers, planned.hidden_size) == ("clip", 4, 32)
    assert planned.models[1].parameters > planned.models[0].parameters


def test_match(tmp_path):
    source = save_dense("vit", tmp_path / "dense")
    planned = plan(source, match="smoe", reference_top_k=2)
    reference, random = (model for model in planned.models if model.name in ("reference SMoE", "random"))
    assert reference.ffn_multiply_adds == random.ffn_multiply_adds
    output = convert(source, tmp_path / "out", strategy="random", match="smoe", reference_top_k=2)
    assert json.loads((output / "config.json").read_text())["moe_intermediate_size"] == 32


class TestMistakes:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"strategy": "anchored"}, "strategy anchored needs gated FFNs, and those of a vit are not"),
            ({"strategy": "calibrated"}, "strategy calibrated walks through decoders, and a vit is none"),
            ({"router_init": "kmeans", "calibration": "x.txt"}, "--router-init kmeans walks through decoders"),
            ({"calibration": "x.txt"}, "--calibration x.txt: nothing learns from a text"),
            ({"num_moe_heads": 5}, "num_moe_heads=5 does not divide hidden_size=32"),
            ({"num_moe_heads": 1}, "--num-moe-heads 1 has no merge layer"),
            ({"strategy": "random", "shared_expert_intermediate_size": 8}, "makes no shared expert of an encoder"),
            ({"shared_expert_intermediate_size": 8}, "strategy exact needs 48"),
            ({"num_experts": 10**14}, "more than any machine holds"),
        ],
    )
    def test_options(self, tmp_path, options, message):
        source = save_dense("vit", tmp_path / "dense")
        with pytest.raises(UserError) as caught:
            convert(source, tmp_path / "out", **options)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"architectures": ["LlamaForCausalLM"]}, "is no model of transformers' vit; name one, such as ViTModel"),
            ({"architectures": ["GPT17"]}, "is no model of transformers' vit"),
            ({"intermediate_size": 32}, "cannot be loaded as its config says"),
            ({"num_hidden_layers": 3}, "lacks tensors"),
            ({"hidden_act": 5}, "hidden_act=5 must be a short name"),
            ({"layer_norm_eps": "small"}, "not a valid ViTConfig"),
            ({"hidden_act": "swoosh"}, "swoosh"),
            ({"patch_size": 0}, "no model can be built so"),
            ({"model_type": "groupvit"}, "model_type='groupvit' is not converted"),
        ],
    )
    def test_configs(self, tmp_path, changes, message):
        source = save_dense("vit", tmp_path / "dense")
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(UserError) as caught:
            convert(source, tmp_path / "out", **SMALL)
        assert message in str(caught.value)
        assert not (tmp_path / "out").exists()

    def test_a_source_without_architectures_is_the_bare_model(self, tmp_path):
        source = tmp_path / "dense"
        ViTModel(TINY["vit"].config(dense=True)).save_pretrained(source)
        config = json.loads((source / "config.json").read_text())
        del config["architectures"]
        (source / "config.json").write_text(json.dumps(config))
        assert type(AutoModel.from_pretrained(convert(source, tmp_path / "out", **SMALL))) is mhmoe.MHMoEViTModel

    def test_verify_finds_a_changed_tensor(self, tmp_path):
        source = save_dense("vit", tmp_path / "dense")
        output = convert(source, tmp_path / "out", **SMALL)
        tensors = load_file(output / "model.safetensors")
        tensors["classifier.bias"] += 1
        save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
        verification = verify(source, output)
        assert verification.changed_tensors == ("classifier.bias",)
        assert len(verification.broken_promises) == 2
        assert "1 differ" in verification.table()

    def test_verify_of_another_folder(self, tmp_path):
        source = save_dense("vit", tmp_path / "dense")
        output = convert(source, tmp_path / "out", **SMALL)
        shutil.copy(source / "config.json", output / "config.json")
        with pytest.raises(UserError, match="is no encoder of mhmoe"):
            verify(source, output)
