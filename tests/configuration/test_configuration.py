import dataclasses
import json
import pydoc
import re
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from tiny import plan_names, tiny_config
from transformers import AutoConfig

from mhmoe import MHMoEConfig, MHMoEModel


ROPE_VARIANTS = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
]

IMPOSSIBLE_VALUES = [
    ("vocab_size", 0),
    ("hidden_size", 0),
    ("intermediate_size", 0),
    ("num_hidden_layers", 0),
    ("num_attention_heads", 0),
    ("num_key_value_heads", 0),
    ("head_dim", 0),
    ("num_moe_heads", 0),
    ("num_moe_heads", -2),
    ("num_experts", 0),
    ("num_experts_per_tok", 0),
    ("moe_intermediate_size", 0),
    ("decoder_sparse_step", 0),
    ("sliding_window", 0),
    ("max_position_embeddings", 0),
    ("shared_expert_intermediate_size", -1),
    ("router_aux_loss_coef", -0.01),
    ("num_attention_heads", 5),  # does not divide the hidden size, 48
    ("num_moe_heads", 5),
    ("num_key_value_heads", 3),  # does not divide the attention heads, 4
    ("num_experts_per_tok", 7),  # of 6 experts
    ("hidden_act", "swiglue"),
    ("mlp_only_layers", [2]),  # of 2 layers
    ("mlp_only_layers", [-1]),
    ("layer_types", ["full_attention"]),  # of 2 layers
    ("layer_types", ["full_attention", "chunked_attention"]),
    ("layer_types", ["full_attention", "sliding_attention"]),  # without a window
    ("no_rope_layers", [1, 0, 1]),
    ("no_rope_layers", [1, 2]),
    ("rope_parameters", {"rope_type": "unheard of", "rope_theta": 1e4}),
    ("head_layer_depth", -1),
    ("head_layer_depth", 4),
    ("merge_layer_depth", 4),
    ("router_type", "topk"),
    ("router_dim", 0),
    ("router_dim", 8),  # without X-MoE's router
    ("router_temperature", 0.3),
    ("router_temperature", 0),
    ("router_temperature", -0.3),
    ("scoring_func", "sigmoid"),
    ("conv_kernel_size", 2),  # without the convolution
    ("conv_stride", 2),
    ("conv_stride", 0),
    ("router_bias_update_rate", -0.001),
    ("router_z_loss_coef", -0.001),
    ("bitnet_packed", True),  # without BitNet
    ("experts_type", "linear"),
    ("moe_latent_size", 0),
]

# of the first field, beside the others
SENSELESS_COMBINATIONS = [
    {"head_merge_bias": True, "num_moe_heads": 1},
    {"head_merge_bias": True, "head_layer_depth": 0, "merge_layer_depth": 0},
    {"head_merge_init": "xavier", "num_moe_heads": 1},
    {"experts_quantization": "nf4", "use_bitnet": True},
    {"token_split": "conv1d", "num_moe_heads": 1},
    {"head_layer_depth": 0, "token_split": "conv1d"},
    {"head_layer_depth": 2, "token_split": "conv1d"},
    {"conv_stride": 3, "token_split": "conv1d", "num_moe_heads": 4},
    {"conv_stride": 4, "token_split": "conv1d", "conv_kernel_size": 2},
    {"use_bitnet": True, "token_split": "conv1d"},
    {"router_temperature": 0, "router_type": "xmoe"},
    {"router_dim": 0, "router_type": "xmoe"},
    {"num_moe_heads": 5, "moe_latent_size": 12},
    {"head_layer_depth": 0, "moe_latent_size": 12},
    {"merge_layer_depth": 0, "moe_latent_size": 12, "num_moe_heads": 1},
    {"moe_latent_size": 12, "token_split": "conv1d"},
    {"private_experts": True, "num_moe_heads": 1},
    {"private_experts": True, "router_type": "xmoe"},
    {"router_input": "token", "router_type": "xmoe"},
    {"router_input": "token", "num_moe_heads": 1},
    {"router_input": "latent", "num_moe_heads": 1, "moe_latent_size": 12},
]

WRONG_TYPES = [
    ("num_moe_heads", "two"),
    ("num_experts", 2.5),
    ("num_experts", True),
    ("norm_topk_prob", "yes"),
    ("mlp_only_layers", 1),
    ("router_aux_loss_coef", "0.01"),
    ("layer_types", "full_attention"),
    ("no_rope_layers", [1.5, 0]),
    ("use_qk_norm", 1),
    ("attention_out_bias", "no"),
    ("gated_mlp", 1),
    ("head_layer_depth", 1.5),
    ("head_merge_init", "he"),
    ("token_split", "conv2d"),
    ("router_type", 3),
    ("scoring_func", "relu"),
    ("use_bitnet", "yes"),
    ("experts_type", 2),
    ("private_experts", 1),
    ("router_input", "layer"),
    ("moe_latent_size", 12.5),
]


def test_a_saved_config_has_later_fields_only_where_they_are_set(tmp_path):
    later = {"experts_type": "two_matrix", "moe_latent_size": 24, "private_experts": True, "router_input": "token"}
    tiny_config().save_pretrained(tmp_path)
    assert not later.keys() & json.loads((tmp_path / "config.json").read_text()).keys()
    tiny_config(**later).save_pretrained(tmp_path)
    assert later.items() <= json.loads((tmp_path / "config.json").read_text()).items()
    assert MHMoEConfig.from_pretrained(tmp_path).to_dict().items() >= later.items()


def test_defaults_are_the_head_2_layer_of_the_second_paper():
    config = MHMoEConfig()
    assert config.model_type == "mhmoe"
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (768, 12, 12)
    assert (config.num_moe_heads, config.num_experts, config.num_experts_per_tok) == (2, 40, 2)
    assert (config.moe_intermediate_size, config.shared_expert_intermediate_size) == (768, 0)
    assert (config.router_aux_loss_coef, config.output_router_logits, config.norm_topk_prob) == (0.01, False, False)
    assert config.moe_layers == list(range(12))
    assert (config.num_key_value_heads, config.head_dim) == (12, 64)


@pytest.mark.parametrize("rope", ROPE_VARIANTS, ids=lambda rope: rope["rope_type"])
def test_json_round_trip(tmp_path: Path, rope: dict):
    config = tiny_config(
        num_moe_heads=4,
        num_experts=7,
        num_experts_per_tok=3,
        moe_intermediate_size=20,
        shared_expert_intermediate_size=12,
        norm_topk_prob=True,
        decoder_sparse_step=2,
        mlp_only_layers=[1],
        num_hidden_layers=4,
        router_aux_loss_coef=0.5,
        output_router_logits=True,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
        no_rope_layers=[1, 1, 0, 1],
        use_qk_norm=True,
        attention_bias=True,
        attention_out_bias=False,
        tie_word_embeddings=True,
        rope_parameters={"rope_theta": 5e5, **rope},
    )
    config.save_pretrained(tmp_path)
    for loaded in (MHMoEConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is MHMoEConfig
        assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
        assert loaded.rope_parameters == {"rope_theta": 5e5, **rope}
        assert loaded.moe_layers == [3]
    assert MHMoEConfig(**json.loads(config.to_json_string())).to_dict() == config.to_dict()


def test_json_holds_every_field_of_the_layer(tmp_path: Path):
    tiny_config(num_moe_heads=4).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "mhmoe"
    assert saved["auto_map"] == {"AutoConfig": "configuration_mhmoe.MHMoEConfig"}
    assert (saved["num_moe_heads"], saved["num_experts"], saved["mlp_only_layers"]) == (4, 6, [])
    assert "base_model_tp_plan" not in saved


@pytest.mark.parametrize(("field", "value"), IMPOSSIBLE_VALUES, ids=str)
def test_impossible_value_is_named(field: str, value):
    with pytest.raises(ValueError, match=field) as raised:
        tiny_config(**{field: value})
    message = str(raised.value)
    assert f"{field}={value!r}" in message
    assert "\n" not in message


@pytest.mark.parametrize("fields", SENSELESS_COMBINATIONS, ids=str)
def test_senseless_combination_is_named(fields: dict):
    field, value = next(iter(fields.items()))
    with pytest.raises(ValueError, match=field) as raised:
        tiny_config(**fields)
    message = str(raised.value)
    assert f"{field}={value!r}" in message
    assert "\n" not in message


@pytest.mark.parametrize(("field", "value"), WRONG_TYPES, ids=str)
def test_wrong_type_is_named(field: str, value):
    with pytest.raises(StrictDataclassFieldValidationError, match=f"'{field}'") as raised:
        tiny_config(**{field: value})
    assert str(value) in str(raised.value)


def test_both_values_of_a_mismatch_are_named():
    with pytest.raises(ValueError, match=r"num_experts_per_tok=7 .* num_experts=6"):
        tiny_config(num_experts_per_tok=7)
    with pytest.raises(ValueError, match=r"num_moe_heads=5 .* hidden_size=48"):
        tiny_config(num_moe_heads=5)
    with pytest.raises(ValueError, match=r"mlp_only_layers=\[0, 4\] names layer 4, .* num_hidden_layers=2"):
        tiny_config(mlp_only_layers=[0, 4])


def test_impossible_value_in_a_file_is_named(tmp_path: Path):
    tiny_config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_moe_heads": 5}))
    with pytest.raises(ValueError, match="num_moe_heads=5"):
        AutoConfig.from_pretrained(tmp_path)


def test_extreme_values_that_make_sense_are_taken():
    tiny_config(num_experts_per_tok=6, num_experts=6)
    tiny_config(num_moe_heads=48, router_aux_loss_coef=0, shared_expert_intermediate_size=0)
    tiny_config(num_experts=1, num_experts_per_tok=1, mlp_only_layers=[0, 1])
    tiny_config(
        head_layer_depth=0, merge_layer_depth=3, head_merge_bias=True, router_bias_update_rate=1, use_bitnet=True
    )
    tiny_config(token_split="conv1d", head_layer_depth=1, conv_kernel_size=48, conv_stride=2)
    tiny_config(router_type="xmoe", router_dim=1, router_temperature=1, scoring_func="sigmoid", num_moe_heads=48)


def test_attention_is_llama_s_unless_asked():
    config = tiny_config()
    assert config.layer_types == ["full_attention"] * 2
    assert (config.no_rope_layers, config.use_qk_norm, config.attention_out_bias) == (None, False, False)


def test_files_without_the_attention_s_newer_fields_keep_their_meaning(tmp_path: Path):
    tiny_config(sliding_window=16, attention_bias=True).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    for field in ("layer_types", "no_rope_layers", "use_qk_norm", "attention_out_bias"):
        del fields[field]
    path.write_text(json.dumps(fields))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.layer_types == ["sliding_attention"] * 2
    assert (config.attention_bias, config.attention_out_bias) == (True, True)


def test_num_local_experts_is_an_alias():
    assert MHMoEConfig(num_local_experts=8).num_experts == 8
    config = tiny_config()
    config.num_local_experts = 12
    assert (config.num_experts, config.num_local_experts) == (12, 12)
    with pytest.raises(ValueError, match="num_experts_per_tok=2 is more than num_experts=1"):
        tiny_config(num_local_experts=1)


@pytest.mark.parametrize(
    ("decoder_sparse_step", "mlp_only_layers", "moe_layers"),
    [
        (1, None, [0, 1, 2, 3, 4, 5]),
        (1, [0, 5], [1, 2, 3, 4]),
        (2, [], [1, 3, 5]),
        (2, [3], [1, 5]),
        (2, [0, 2], [1, 3, 5]),
        (3, [], [2, 5]),
        (6, [], [5]),
        (7, [], []),
        (1, [0, 1, 2, 3, 4, 5], []),
    ],
)
def test_moe_layers(decoder_sparse_step, mlp_only_layers, moe_layers):
    config = tiny_config(num_hidden_layers=6, decoder_sparse_step=decoder_sparse_step, mlp_only_layers=mlp_only_layers)
    assert config.moe_layers == moe_layers


VARIANTS = [
    {},
    {"shared_expert_intermediate_size": 16},
    {"num_moe_heads": 1},
    {"num_moe_heads": 1, "shared_expert_intermediate_size": 16},
    {"mlp_only_layers": [0]},
    {"mlp_only_layers": [0], "shared_expert_intermediate_size": 16},
    {"mlp_only_layers": [0, 1]},
    {"mlp_only_layers": [0, 1], "shared_expert_intermediate_size": 16},
    {"decoder_sparse_step": 2, "mlp_bias": True, "attention_bias": True},
    {"use_qk_norm": True},
]


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_tensor_parallel_plan_is_of_the_modules_that_are_there(fields: dict):
    """Every rule meets a module or parameter, and every projection of every FFN and attention has its rule."""
    config = tiny_config(**fields)
    model = MHMoEModel(config)
    names = plan_names(model)
    assert set(config.base_model_tp_plan) <= names
    planned = ("_proj", "q_norm.weight", "k_norm.weight")
    projections = {name.removesuffix(".weight") for name in names if name.endswith(planned)}
    assert projections == {rule for rule in config.base_model_tp_plan if rule.endswith(("_proj", "q_norm", "k_norm"))}


def test_plans_of_two_configs_are_their_own():
    with_shared_expert = tiny_config(shared_expert_intermediate_size=16)
    without = tiny_config()
    assert "layers.*.mlp.shared_expert.up_proj" in with_shared_expert.base_model_tp_plan
    assert "layers.*.mlp.shared_expert.up_proj" not in without.base_model_tp_plan
    assert "layers.*.mlp.gate_proj" in MHMoEConfig.base_model_tp_plan
    assert set(without.base_model_ep_plan) - {"layers.*.mlp.gate"} == {  # whose rule is of transformers before 5.19
        "layers.*.mlp.experts",
        "layers.*.mlp.experts.gate_up_proj",
        "layers.*.mlp.experts.down_proj",
    }


def test_help_states_the_defaults_that_hold():
    text, config = pydoc.plain(pydoc.render_doc(MHMoEConfig)), MHMoEConfig()
    found = re.findall(r"(\w+) \(`[^)]*`, \*optional\*, defaults to `?([^)`]+)`?\)", text)
    fields = {field.name for field in dataclasses.fields(config)}  # others are arguments of methods
    stated = [(field, default) for field, default in found if field in fields]
    assert {"hidden_size", "num_experts", "use_bitnet"} <= {field for field, _ in stated}
    for field, default in stated:
        assert str(getattr(config, field)) == default.strip('"'), field
