"""The rows of the papers' tables, by name."""

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_config
from transformers import GPT2Config

from mhmoe import MHMoEConfig, MHMoEForCausalLM, params_command
from mhmoe.configuration import PRESETS, costs, parse_overrides
from mhmoe.errors import UserError


FIELDS = ("hidden_size", "intermediate_size", "num_experts", "num_experts_per_tok", "moe_intermediate_size")
LATENT = [name for name in PRESETS if name.startswith("latentmoe")]
P2_SPARSE = ["p2-smoe", "p2-fine-grained", "p2-mhmoe-head2", "p2-mhmoe-head3"]


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in LATENT])
def test_every_row_is_a_config_that_survives_another_size(name):
    config = MHMoEConfig.from_preset(name)
    assert {field: getattr(config, field) for field in PRESETS[name]} == PRESETS[name]
    assert config.moe_layers == ([] if "dense" in name else [1, 3, 5, 7, 9, 11])
    # a size at which all is in the paper's proportions
    half = MHMoEConfig.from_preset(name, hidden_size=384, num_hidden_layers=4)
    assert half.moe_layers == ([] if "dense" in name else [1, 3])
    assert half.num_experts == config.num_experts
    assert half.num_attention_heads == 6
    assert half.intermediate_size * 2 == config.intermediate_size
    assert half.shared_expert_intermediate_size * 2 == config.shared_expert_intermediate_size
    if "dense" not in name:
        assert half.moe_intermediate_size * 2 == pytest.approx(config.moe_intermediate_size, abs=8)


@pytest.mark.parametrize("name", PRESETS)
def test_counts_are_those_of_the_modules(name):
    config = MHMoEConfig.from_preset(name, num_hidden_layers=2)  # one of each kind
    with torch.device("meta"):
        model = MHMoEForCausalLM(config)
    counted = costs(config)
    assert counted.parameters == model.num_parameters()
    experts = sum(parameter.numel() for key, parameter in model.named_parameters() if ".experts." in key)
    assert counted.expert_parameters == experts


def test_p2_rows_are_at_parity():
    for overrides in ({}, {"hidden_size": 384}, {"hidden_size": 192}):
        # every layer sparse, or the dense ones would even out what differs
        rows = [costs(MHMoEConfig.from_preset(name, decoder_sparse_step=1, **overrides)) for name in P2_SPARSE]
        dense = costs(MHMoEConfig.from_preset("p2-dense", **overrides))
        for row in rows:
            assert row.ffn_multiply_adds == pytest.approx(dense.ffn_multiply_adds, rel=0.001)
        parameters = [row.ffn_parameters for row in rows]
        assert max(parameters) / min(parameters) < 1.07


@pytest.mark.parametrize(("size", "top_k"), [("16b", 24), ("95b", 22)])
def test_latentmoe_s_rows(size, top_k):
    smoe, eff, acc = (MHMoEConfig.from_preset(f"latentmoe-{size}-{variant}") for variant in ("smoe", "eff", "acc"))
    assert (smoe.moe_latent_size, eff.moe_latent_size) == (None, smoe.hidden_size // 4)
    assert [config.num_experts_per_tok for config in (smoe, eff, acc)] == [6, 6, top_k]
    counted = [costs(config) for config in (smoe, eff, acc)]
    assert len({row.expert_parameters for row in counted}) == 1
    if size == "95b":  # the paper's table 3: 8.47B, 5.62B and 8.44B active parameters
        active = [(counted[0].active_parameters - row.active_parameters) / 1e9 for row in counted]
        assert active == pytest.approx([0, 2.85, 0.03], abs=0.015)
        assert counted[2].parameters == pytest.approx(94.8e9, rel=0.01)


@pytest.mark.parametrize("name", LATENT)
def test_latentmoe_s_rows_survive_another_size(name):
    config = MHMoEConfig.from_preset(name)
    small = MHMoEConfig.from_preset(name, hidden_size=config.hidden_size // 8, num_hidden_layers=2)
    assert small.num_experts == config.num_experts
    for field in ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"):
        assert getattr(small, field) * 8 == pytest.approx(getattr(config, field), abs=32), field
    assert small.latent_size * 8 == config.latent_size
    assert small.hidden_size // small.num_attention_heads == 128
    model = MHMoEForCausalLM(
        MHMoEConfig.from_preset(name, hidden_size=64, num_hidden_layers=2, vocab_size=16, num_experts=32)
    )
    model(torch.arange(8)[None])


@pytest.mark.parametrize("fields", [{"private_experts": True}, {"moe_latent_size": 192, "router_input": "token"}])
def test_p2_s_row_with_later_layers_is_at_parity(fields):
    row, other = (
        MHMoEConfig.from_preset("p2-mhmoe-head2", hidden_size=384, decoder_sparse_step=1, **more)
        for more in ({}, fields)
    )
    assert costs(other).ffn_multiply_adds == pytest.approx(costs(row).ffn_multiply_adds, rel=0.01)
    smoe = costs(MHMoEConfig.from_preset("p2-smoe", hidden_size=384, decoder_sparse_step=1))
    # 8 experts more or fewer, in each layer and head, is how finely the number of experts is rounded
    step = 8 * costs(other).expert_parameters // other.num_experts
    assert abs(costs(other).ffn_parameters - smoe.ffn_parameters) <= step / 2


def test_parity_is_solved_for_the_experts_own_matrices():
    fields = {"hidden_size": 192, "decoder_sparse_step": 1, "gated_mlp": False}
    rows = [costs(MHMoEConfig.from_preset(name, **fields)).ffn_multiply_adds for name in P2_SPARSE]
    assert rows == pytest.approx([rows[0]] * len(rows), rel=0.02)


def test_p2_sizes_are_the_solved_ones():
    for name in P2_SPARSE:
        given = MHMoEConfig.from_preset(name)
        solved = MHMoEConfig.from_preset(name, hidden_size=768)
        assert [getattr(given, field) for field in FIELDS] == [getattr(solved, field) for field in FIELDS]


# millions: parameters that are no expert's, those of the experts
TABLE_11 = {
    "p1-xmoe-8": (134, 227),
    "p1-xmoe-16": (134, 454),
    "p1-xmoe-32": (134, 908),
    "p1-mhmoe-8": (141, 213),
    "p1-mhmoe-16": (141, 430),
    "p1-mhmoe-32": (141, 898),
}
TABLE_11_SUMS = {
    **{f"p1-xmoe-{experts}": millions for experts, millions in [(64, 1949), (128, 3765), (256, 7397)]},
    **{f"p1-mhmoe-{experts}": millions for experts, millions in [(64, 1938), (128, 3765), (256, 7371)]},
}


@pytest.mark.parametrize("name", [*TABLE_11, *TABLE_11_SUMS])
def test_p1_table_11(name):
    counted = costs(MHMoEConfig.from_preset(name))
    if name in TABLE_11:
        other, experts = TABLE_11[name]
        assert (counted.parameters - counted.expert_parameters) / 1e6 == pytest.approx(other, rel=0.01)
        assert counted.expert_parameters / 1e6 == pytest.approx(experts, rel=0.01)
    assert counted.parameters / 1e6 == pytest.approx(TABLE_11_SUMS.get(name) or sum(TABLE_11[name]), rel=0.01)


def test_p1_table_5_has_equal_parameters():
    rows = [costs(MHMoEConfig.from_preset(f"p1-mhmoe-8-head{heads}")) for heads in (2, 4, 6, 8, 12)]
    assert len({row.expert_parameters for row in rows}) == 1


def test_overrides_go_first():
    config = MHMoEConfig.from_preset("p2-mhmoe-head3", hidden_size=192, num_experts=24, mlp_only_layers=[1])
    assert (config.num_experts, config.moe_intermediate_size) == (24, 128)
    assert config.moe_layers == [3, 5, 7, 9, 11]
    assert MHMoEConfig.from_preset("p2-dense", mlp_only_layers=[1]).moe_layers == [3, 5, 7, 9, 11]


def test_overrides_are_read_as_json():
    text = 'a=1,b=[1, 2],c=gelu,d=1e-3,e=True,f=null,g={"x": 1}'
    assert parse_overrides(text) == {"a": 1, "b": [1, 2], "c": "gelu", "d": 1e-3, "e": True, "f": None, "g": {"x": 1}}
    assert parse_overrides(None) == {}


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("p2-mhmoe-h3", {}, "preset='p2-mhmoe-h3' is not known; the nearest are p2-mhmoe-head3, "),
        ("p2-smoe", {"hiden_size": 192}, "hiden_size=192: MHMoEConfig has no such field; the nearest are hidden_size"),
    ],
)
def test_mistakes_get_one_line(name, overrides, message):
    with pytest.raises(UserError) as error:
        MHMoEConfig.from_preset(name, **overrides)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


# mhmoe params


def test_params_of_presets_and_folders(tmp_path, capsys):
    tiny_config().save_pretrained(tmp_path / "tiny")
    params_command.main(["p2-smoe", "p2-mhmoe-head2", str(tmp_path / "tiny")])
    header, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert header[:2] == ["parameters", "active"]
    assert [row[0] for row in rows] == ["p2-smoe", "p2-mhmoe-head2", str(tmp_path / "tiny")]
    smoe, mhmoe = (costs(MHMoEConfig.from_preset(row[0])) for row in rows[:2])
    assert rows[1][1:] == [
        f"{mhmoe.parameters:,}",
        f"{mhmoe.active_parameters:,}",
        f"{mhmoe.expert_parameters:,}",
        f"{mhmoe.parameters - mhmoe.expert_parameters:,}",
        f"{mhmoe.ffn_parameters:,}",
        f"{mhmoe.ffn_parameters / smoe.ffn_parameters:.3f}",
        f"{mhmoe.ffn_multiply_adds:,}",
        "1.000",
    ]
    assert rows[2][1] == f"{costs(tiny_config()).parameters:,}"


def test_params_of_a_paper_at_another_size(capsys):
    params_command.main(["--paper", "2", "--config_overrides", "hidden_size=192,num_hidden_layers=4", "--json"])
    counted = json.loads(capsys.readouterr().out)
    assert list(counted) == [name for name in PRESETS if name.startswith("p2-")]
    small = MHMoEConfig.from_preset("p2-mhmoe-head3", hidden_size=192, num_hidden_layers=4)
    assert counted["p2-mhmoe-head3"] == vars(costs(small))
    params_command.main([])
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(PRESETS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["p2-mhmoe"], "preset='p2-mhmoe' is not known"),
        (["no/such"], "no/such: no such folder, and no such model within reach on the Hub"),
        (["gpt"], "gpt: a gpt2 is not Llama-style"),
        (["--paper", "3"], "--paper"),
        (["--paper", "2", "p2-smoe"], "--paper 2: names the models, and so does p2-smoe"),
        (["p2-smoe", "--config_overrides", "num_experts=0"], "preset=p2-smoe: num_experts=0 must be at least 1."),
        (["p2-smoe", "--config_overrides", "num_experts=x"], "preset=p2-smoe: "),
        (["wrong"], "wrong/config.json: hidden_size='x' must be a whole number"),
        (["p2-smoe", "--config-overrides", "hidden_size=-8"], "hidden_size=-8 must be a positive integer."),
        (["gpt", "--config_overrides", "num_experts=2"], "config_overrides: for presets, and gpt is none"),
    ],
)
def test_params_mistakes_get_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    GPT2Config().save_pretrained("gpt")
    MHMoEConfig().save_pretrained("wrong")
    config = Path("wrong", "config.json")
    config.write_text(config.read_text().replace('"hidden_size": 768', '"hidden_size": "x"'))
    with pytest.raises(UserError) as error:
        params_command.main(arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "overrides", "start"),
    [
        ("p2-mhmoe-head2", {}, "xavier"),
        ("p2-smoe-both", {}, "xavier"),
        ("p2-smoe", {}, "normal"),
        ("p2-mhmoe-head2-neither", {}, "normal"),
        ("p2-mhmoe-head2", {"num_moe_heads": 1}, "normal"),
        ("p1-mhmoe-8", {"head_layer_depth": 0, "merge_layer_depth": 0}, "normal"),
        ("p2-mhmoe-head3", {"head_merge_init": "normal"}, "normal"),
    ],
)
def test_how_head_and_merge_layers_start(name, overrides, start):
    """As in the authors' code, where there are any."""
    config = MHMoEConfig.from_preset(name, **overrides)
    assert config.head_merge_init == start
    assert any(config.layer_depths) or not config.head_merge_bias


def test_a_start_of_layers_that_are_left_out_is_refused():
    with pytest.raises(ValueError, match="head_merge_init='xavier' is for head and merge layers"):
        MHMoEConfig.from_preset("p2-mhmoe-head2", num_moe_heads=1, head_merge_init="xavier")
