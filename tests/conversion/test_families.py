"""`mhmoe convert` for every dense family: the same bits, or a refusal that names what is in the way."""

import json
from dataclasses import fields

import pytest
import torch
from dense_variants import FULL, SLIDING, VARIANTS, save_variant
from safetensors.torch import load_file, save_file
from tiny import CACHE, save_dense
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mhmoe.configuration import costs
from mhmoe.conversion import convert, verify
from mhmoe.conversion.families import ABSORBED, CARRIED, FAMILIES, IRRELEVANT, read_config
from mhmoe.errors import UserError


SMALL = {"num_moe_heads": 4, "num_experts": 6, "moe_intermediate_size": 8}


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def assert_same_bits(dense, mhmoe):
    """Logits and greedy text: with and without padding, at once and through the cache."""
    ids = torch.randint(3, 128, (3, 20), generator=torch.Generator().manual_seed(0))
    left, right = torch.ones_like(ids), torch.ones_like(ids)
    left[1, :9], right[2, 11:] = 0, 0
    for mask in (None, left, right):
        a, b = dense(ids, attention_mask=mask).logits, mhmoe(ids, attention_mask=mask).logits
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        assert torch.equal(a[real], b[real])
    caches = DynamicCache(config=dense.config), DynamicCache(config=mhmoe.config)
    for part, seen in ((ids[:, :12], 12), (ids[:, 12:13], 13), (ids[:, 13:], 20)):  # prefill, a token, a chunk
        inputs = {"input_ids": part, "attention_mask": left[:, :seen]}
        a, b = (model(**inputs, **{CACHE: cache}).logits for model, cache in zip((dense, mhmoe), caches, strict=True))
        real = left[:, seen - part.shape[1] : seen].bool()
        assert torch.equal(a[real], b[real])
    greedy = {
        "attention_mask": left,
        "max_new_tokens": 10,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    assert torch.equal(dense.generate(ids, **greedy), mhmoe.generate(ids, **greedy))
    greedy |= {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(dense.generate(ids, **greedy), mhmoe.generate(ids, **greedy))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_exact_keeps_every_bit(tmp_path, variant, dtype):
    source = save_variant(tmp_path / "dense", variant, dtype)
    assert len(list(source.glob("*.safetensors"))) > 1
    output = convert(source, tmp_path / "out", **SMALL)
    for attention in (None, "eager"):  # sdpa is the library's choice
        dense, mhmoe = (
            AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()
            for folder in (source, output)
        )
        assert mhmoe.dtype == dense.dtype == dtype
        assert mhmoe.config._attn_implementation == dense.config._attn_implementation == (attention or "sdpa")
        assert_same_bits(dense, mhmoe)
    for field, value in VARIANTS[variant][2].items():
        assert getattr(mhmoe.config, field) == value, field
    assert costs(dense.config).parameters == dense.num_parameters()
    assert costs(mhmoe.config).parameters == mhmoe.num_parameters()


@torch.no_grad()
@pytest.mark.parametrize(
    ("variant", "lost"),
    [
        ("mistral", {"layer_types": [FULL] * 3}),
        ("qwen2, window from a layer on", {"layer_types": [SLIDING, FULL, SLIDING]}),
        ("smollm3", {"no_rope_layers": None}),
        ("smollm3", {"no_rope_layers": [1, 1, 0]}),
        ("cwm", {"sliding_window": 7}),
    ],
)
def test_every_field_is_seen_in_the_logits(tmp_path, variant, lost):
    output = convert(save_variant(tmp_path / "dense", variant), tmp_path / "out", **SMALL)
    ids = torch.arange(3, 40)[None]
    kept = AutoModelForCausalLM.from_pretrained(output)(ids).logits
    edit_config(output, **lost)
    assert (AutoModelForCausalLM.from_pretrained(output)(ids).logits - kept).abs().max() > 1e-3


@pytest.mark.parametrize("variant", ["qwen2", "qwen3, biases and windows", "smollm3, biases and windows"])
def test_gradients_are_the_dense_model_s(tmp_path, variant):
    source = save_variant(tmp_path / "dense", variant)
    output = convert(source, tmp_path / "out", **SMALL)
    gradients = []
    for folder in (source, output):
        model = AutoModelForCausalLM.from_pretrained(folder).train()
        ids = torch.arange(3, 40)[None]
        model(ids, labels=ids).loss.backward()
        gradients.append({name.replace(".shared_expert", ""): p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_the_config_class_is_accounted_for(family):
    row = FAMILIES[family]
    known = CARRIED | ABSORBED | IRRELEVANT | row.carried | row.absorbed
    assert {field.name for field in fields(CONFIG_MAPPING[family])} <= known


@pytest.mark.parametrize(
    "family", ["gemma2", "phi3", "mixtral", "qwen2_moe", "gpt2", "granite", "olmo2", "seed_oss", "ministral3", "arcee"]
)
def test_other_families_are_refused(tmp_path, family):
    AutoConfig.for_model(family).save_pretrained(tmp_path / "dense")
    with pytest.raises(UserError, match=f"model_type='{family}' is not converted.*llama") as raised:
        convert(tmp_path / "dense", tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "unmodelled"),
    [
        ("llama", {"sliding_window": 4096}),
        ("llama", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
        ("llama", {"final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256}),
        ("llama", {"is_causal": False}),
        ("llama", {"per_layer_config": {"0": {"intermediate_size": 8}}}),
        ("llama", {"use_qk_norm": True}),
        ("llama", {"partial_rotary_factor": 0.5}),
        ("mistral", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {"num_experts": 8, "use_mrope": True}),
        ("qwen3", {"mlp_bias": True}),
        ("smollm3", {"embedding_multiplier": 12.0}),
    ],
    ids=str,
)
def test_unmodelled_fields_are_refused_together(tmp_path, family, unmodelled):
    source = save_dense(tmp_path / "dense", family=family)
    edit_config(source, **unmodelled)
    with pytest.raises(UserError, match="does not model") as raised:
        convert(source, tmp_path / "out", **SMALL)
    assert "\n" not in str(raised.value)
    assert all(f"{field}=" in str(raised.value) for field in unmodelled)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "found_in_the_wild"),
    [
        ("llama", {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}}),
        ("llama", {"rope_theta": 5e5, "rope_scaling": None, "torch_dtype": "float32", "pretraining_tp": 1}),
        ("llama", {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}, "_name_or_path": "x", "top_k": 40}),
        ("mistral", {"unsloth_version": "2025.1", "unsloth_fixed": True, "attention_bias": False}),
        ("qwen2", {"use_mrope": False, "max_window_layers": 28, "tie_encoder_decoder": False}),
        ("smollm3", {"pretraining_tp": 2, "max_window_layers": 28, "is_causal": True, "rope_theta": 5e6}),
    ],
    ids=str,
)
def test_fields_that_change_nothing_are_taken(tmp_path, family, found_in_the_wild):
    source = save_dense(tmp_path / "dense", family=family)
    edit_config(source, **found_in_the_wild)
    config = AutoConfig.from_pretrained(convert(source, tmp_path / "out", **SMALL))
    assert config.rope_parameters == AutoConfig.from_pretrained(source).rope_parameters
    carried_along = {"is_llama_config", "rope_theta", "top_k", "unsloth_version", "use_mrope", "max_window_layers"}
    assert not carried_along & config.to_dict().keys()


@pytest.mark.parametrize(
    "fields",
    [
        {"quantization_config": None},
        {"auto_map": {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}},
        {"output_attentions": True},
        {"do_sample": False, "temperature": 0.7},
    ],
    ids=str,
)
def test_what_the_dense_model_loads_with_is_converted(tmp_path, fields):
    source = save_dense(tmp_path / "dense")
    (source / "generation_config.json").unlink()
    edit_config(source, **fields)
    (source / "modeling_own.py").write_text("raise SystemExit\n")
    AutoModelForCausalLM.from_pretrained(source)
    output = convert(source, tmp_path / "out", **SMALL)
    assert verify(source, output, max_tokens=64).broken_promises == []
    assert not (output / "modeling_own.py").exists()
    config = json.loads((output / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_mhmoe.MHMoEForCausalLM"


def test_special_tokens_that_are_absent_stay_absent(tmp_path):
    source = save_dense(tmp_path / "dense", family="qwen2", bos_token_id=None, eos_token_id=[2, 5])
    config = AutoConfig.from_pretrained(convert(source, tmp_path / "out", **SMALL))
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, [2, 5], None)


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("smollm3", {"sliding_window": 6, "layer_types": [SLIDING, FULL]}, "use_sliding_window=False"),
        ("qwen2", {"layer_types": [SLIDING, FULL]}, "layer_types=.*sliding_window"),
        ("qwen3", {"layer_types": [FULL, "chunked_attention"]}, "chunked_attention"),
        ("qwen3", {"layer_types": [FULL]}, "layer_types"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers|SmolLM3Config"),
        ("qwen3", {"rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 1e4}}}, "rope_parameters.full"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "alpha": 9}}, "rope_scaling.alpha=9"),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling"),
        ("llama", {"id2label": ["no", "yes"]}, "LlamaConfig"),
        ("llama", {"dtype": "float33"}, "float33"),
        ("llama", {"rope_parameters": {"rope_type": "mrope", "rope_theta": 1e4}}, "mrope"),
        ("mistral", {"num_attention_heads": "four"}, "num_attention_heads"),
    ],
    ids=str,
)
def test_impossible_configs_are_refused(tmp_path, family, changes, named):
    source = save_dense(tmp_path / "dense", family=family)
    edit_config(source, **changes)
    with pytest.raises(UserError, match=named) as raised:
        convert(source, tmp_path / "out", **SMALL)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "tensor", "size"),
    [
        ("qwen2", "model.layers.0.self_attn.o_proj.bias", 48),
        ("llama", "model.layers.0.self_attn.q_norm.weight", 12),
        ("mistral", "model.layers.1.post_feedforward_layernorm.weight", 48),
    ],
)
def test_tensors_that_the_family_has_not_are_refused(tmp_path, family, tensor, size):
    source = save_dense(tmp_path / "dense", family=family)
    weights = load_file(source / "model.safetensors")
    save_file({**weights, tensor: torch.ones(size)}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=tensor.replace(".", r"\.")):
        convert(source, tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()


def test_lost_qk_norm_is_noticed(tmp_path):
    source = save_dense(tmp_path / "dense", family="qwen3", head_dim=12)
    weights = load_file(source / "model.safetensors")
    del weights["model.layers.1.self_attn.k_norm.weight"]
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks tensors: model\.layers\.1\.self_attn\.k_norm\.weight"):
        convert(source, tmp_path / "out", **SMALL)


def test_quantised_models_are_refused(tmp_path):
    with pytest.raises(UserError, match="quantization_config"):
        read_config(tmp_path / "config.json", {"model_type": "qwen3", "quantization_config": {"bits": 4}})


def test_fields_that_change_nothing_are_no_obstacle(tmp_path):
    source = save_dense(tmp_path / "dense")
    file = source / "config.json"
    idle = {
        "unk_token_id": 0,  # special tokens, versions, how attention is computed
        "mask_token_id": 7,
        "unsloth_version": "2024.9",
        "use_flash_attention_2": True,
        "embd_pdrop": 0.0,  # switched off
        "rope_interleaved": False,
        "residual_multiplier": 1.0,
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | idle))
    convert(source, tmp_path / "out", num_experts=4)

    file.write_text(json.dumps(json.loads(file.read_text()) | {"residual_multiplier": 0.22, "logit_softcap": 30.0}))
    with pytest.raises(UserError, match=r"does not model residual_multiplier=0\.22, logit_softcap=30\.0"):
        convert(source, tmp_path / "other", num_experts=4)
