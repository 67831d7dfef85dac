"""The conversion strategies other than `exact`: what each promises, on tiny dense models."""

import json
import re
import shlex

import pyarrow
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tiny import save_dense
from transformers import AutoModelForCausalLM, LlamaConfig

from mhmoe import MHMoEConfig
from mhmoe.configuration import costs
from mhmoe.conversion import convert, plan, verify
from mhmoe.conversion.calibration import LayerWalk, read_rows
from mhmoe.conversion.checkpoint import DenseCheckpoint
from mhmoe.conversion.convert_command import main
from mhmoe.conversion.sizes import Sizes
from mhmoe.conversion.strategies import STRATEGIES
from mhmoe.errors import UserError


SIZES = {"num_moe_heads": 4, "num_experts": 6, "moe_intermediate_size": 8}


@pytest.fixture
def dense(tmp_path):
    return save_dense(tmp_path / "dense")


init = LayerWalk.__init__


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def edit_weights(folder, name, edit):
    weights = weights_of(folder)
    weights[name] = edit(weights[name])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_every_strategy_has_its_promise():
    assert STRATEGIES.keys() == {"exact", "anchored", "calibrated", "random"}
    assert all(name == strategy.name for name, strategy in STRATEGIES.items())
    assert all(strategy.promise.text and strategy.untrained for strategy in STRATEGIES.values())


@pytest.mark.parametrize("heads", [1, 4])
def test_random_copies_all_but_the_ffns(tmp_path, dense, heads):
    output = convert(dense, tmp_path / "out", strategy="random", **{**SIZES, "num_moe_heads": heads})
    old, new = weights_of(dense), weights_of(output)
    copied = {name for name in old if ".mlp." not in name}
    assert copied == {name for name in new if ".mlp." not in name}
    assert all(torch.equal(old[name], new[name]) for name in copied)
    for name in new.keys() - copied:
        assert "shared_expert" not in name
        assert new[name].count_nonzero() == new[name].numel(), name
    assert AutoModelForCausalLM.from_pretrained(output).config.shared_expert_intermediate_size == 0
    assert "untrained" in ModelCard.load(output / "README.md").text


def test_random_is_verified_by_what_was_copied(tmp_path, dense):
    output = convert(dense, tmp_path / "out", strategy="random", **SIZES)
    verification = verify(dense, output, max_tokens=64)
    assert verification.broken_promises == []
    assert verification.max_logit_difference > 0.1
    edit_weights(output, "model.layers.1.self_attn.q_proj.weight", lambda weight: weight + 1e-6)
    (broken,) = verify(dense, output, max_tokens=64).broken_promises
    assert broken.startswith("model.layers.1.self_attn.q_proj.weight is not")


def test_random_has_a_shared_expert_where_asked(tmp_path):
    source = save_dense(tmp_path / "dense", torch.bfloat16, mlp_bias=True)
    options = {"shared_expert_intermediate_size": 40, "norm_topk_prob": False}
    output = convert(source, tmp_path / "out", strategy="random", **SIZES, **options)
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.model.layers[0].mlp.shared_expert.gate_proj.weight.shape == (40, 48)
    assert model.config.norm_topk_prob is False
    assert not model.model.layers[0].mlp.shared_expert.down_proj.bias.any()
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(("heads", "top_k", "extra"), [(2, 1, 0), (4, 3, 5), (4, 2, 0)])
def test_anchored_keeps_the_logits_whatever_the_router_does(tmp_path, heads, top_k, extra):
    source = save_dense(tmp_path / "dense", hidden_act="gelu" if extra else "silu", max_shard_size="40KB")
    sizes = {"num_moe_heads": heads, "num_experts": 5, "moe_intermediate_size": 24 // heads + extra}
    output = convert(source, tmp_path / "out", strategy="anchored", num_experts_per_tok=top_k, **sizes)
    dense, mhmoe = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, output))
    assert mhmoe.config.shared_expert_intermediate_size == 96 - 24
    ids = torch.randint(3, 128, (3, 40), generator=torch.Generator().manual_seed(0))
    for seed in range(3):
        torch.manual_seed(seed)
        for layer in mhmoe.model.layers:
            torch.nn.init.normal_(layer.mlp.gate.weight, std=seed)
        torch.testing.assert_close(mhmoe(ids).logits, dense(ids).logits, rtol=0, atol=2e-5)
    # the experts carry a real part of the FFN: without them the logits are others
    torch.nn.init.zeros_(mhmoe.model.layers[0].mlp.merge_layer.weight)
    assert (mhmoe(ids).logits - dense(ids).logits).abs().max() > 0.01


def test_anchored_neurons_are_spread_by_strength_and_every_neuron_is_there_once(tmp_path, dense):
    old = weights_of(dense)
    new = weights_of(convert(dense, tmp_path / "out", strategy="anchored", **SIZES))
    for layer in range(2):
        ffn = f"model.layers.{layer}.mlp."
        gate, up, down = (old[f"{ffn}{kind}_proj.weight"] for kind in ("gate", "up", "down"))
        strength = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
        moved = strength.argsort(descending=True)[2::4].tolist()
        heads = new[ffn + "head_layer.weight"].view(4, 2, 6, 48)
        columns = new[ffn + "merge_layer.weight"].view(48, 4, 2, 6)
        for rank, neuron in enumerate(moved):
            head, place = rank % 4, rank // 4
            assert torch.equal(heads[head, 0, place], gate[neuron])
            assert torch.equal(heads[head, 1, place], up[neuron])
            assert torch.equal(columns[:, head, 0, place], down[:, neuron])
        kept = [neuron for neuron in range(96) if neuron not in moved]
        assert torch.equal(new[ffn + "shared_expert.gate_proj.weight"], gate[kept])
        assert torch.equal(new[ffn + "shared_expert.up_proj.weight"], up[kept])
        assert torch.equal(new[ffn + "shared_expert.down_proj.weight"], down[:, kept])


def test_anchored_has_gradients_everywhere_within_two_steps(tmp_path, dense):
    model = AutoModelForCausalLM.from_pretrained(
        convert(dense, tmp_path / "out", strategy="anchored", **SIZES)
    ).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    generator = torch.Generator().manual_seed(0)
    for step in range(2):
        ids = torch.randint(3, 128, (4, 64), generator=generator)
        model(ids, labels=ids).loss.backward()
        if step == 0:
            mlp = model.model.layers[0].mlp
            # both halves of the outputs: where the identity neurons write and where nothing does yet
            assert mlp.experts.down_proj.grad.abs().amax(dim=(0, 2)).min() > 0
            assert mlp.merge_layer.weight.grad.any()
            assert mlp.head_layer.weight.grad.abs().amax(dim=1).min() > 0
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        changed = parameter != before[name]
        assert changed.flatten(1).any(dim=1).all() if ".experts." in name else changed.any(), name


def test_anchored_costs_at_most_a_fifth_more_at_its_smallest_experts():
    # SmolLM2-135M's sizes
    dense = LlamaConfig(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3)
    sizes = {"num_moe_heads": 4, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 72}
    shared = STRATEGIES["anchored"].shared_width(dense, Sizes(**sizes))
    fields = {field: getattr(dense, field) for field in ("hidden_size", "intermediate_size", "num_attention_heads")}
    mhmoe = MHMoEConfig(**fields, **sizes, num_hidden_layers=32, shared_expert_intermediate_size=shared)
    assert 1 < costs(mhmoe).ffn_multiply_adds / costs(dense).ffn_multiply_adds <= 1.2


def test_anchored_is_verified_in_float32_by_logits_and_in_bfloat16_by_perplexity(tmp_path, dense):
    output = convert(dense, tmp_path / "out", strategy="anchored", **SIZES)
    verification = verify(dense, output, max_tokens=96)
    assert verification.broken_promises == []
    assert 0 < verification.max_logit_difference < 2e-5
    half = verify(dense, output, max_tokens=96, dtype="bfloat16")
    assert half.broken_promises == []
    assert half.max_logit_difference > 2e-4
    edit_weights(output, "model.norm.weight", lambda weight: weight * 3)
    for dtype, words in (("float32", "logit difference"), ("bfloat16", "perplexity")):
        assert any(words in broken for broken in verify(dense, output, max_tokens=96, dtype=dtype).broken_promises)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.jsonl"
    words = torch.randint(97, 123, (24, 300), generator=torch.Generator().manual_seed(1))
    file.write_text("".join(json.dumps({"text": "".join(map(chr, row))}) + "\n" for row in words.tolist()))
    return file


@pytest.mark.parametrize("tied", [False, True])
def test_calibrated_costs_the_same_and_is_nearer_than_merely_keeping(tmp_path, text, tied):
    source = save_dense(tmp_path / "dense", tie_word_embeddings=tied, max_shard_size="40KB")
    options = {"num_experts": 5, "calibration": text, "calibration_tokens": 6000}
    output = convert(source, tmp_path / "out", strategy="calibrated", **options)
    report = json.loads((output / "conversion.json").read_text())
    new, old = (report["costs"][kind]["ffn_multiply_adds"] for kind in ("mhmoe", "dense"))
    assert new == pytest.approx(old, rel=0.01)
    sizes = report["sizes"]
    assert sizes["moe_intermediate_size"] >= 2 * 48 / (2 * sizes["num_moe_heads"])
    errors = report["figures"]["held_out_relative_error"]
    assert len(errors) == 2
    assert all(0 < layer["distilled"] < layer["refitted"] < layer["kept"] < 1 for layer in errors)
    assert verify(source, output, max_tokens=96).broken_promises == []


def test_calibrated_model_is_the_one_that_was_fitted(tmp_path, dense, text, monkeypatch):
    """The model whose errors are reported and the written one are the same function."""
    walks = []
    monkeypatch.setattr(
        LayerWalk, "__init__", lambda self, *args: (walks.append((self, args[1])), init(self, *args))[1]
    )
    output = convert(dense, tmp_path / "out", strategy="calibrated", calibration=text, calibration_tokens=2000)
    ((walk, rows),) = walks
    model = AutoModelForCausalLM.from_pretrained(output)
    expected = model(rows, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(model.model.norm(walk.states), expected, rtol=0, atol=1e-4)


def test_calibration_text_is_read_from_the_middle_of_records_and_from_zst(tmp_path, dense):
    checkpoint = DenseCheckpoint(dense)
    records = [{"text": letter * 9000} for letter in "abc"]
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(json.dumps(record) + "\n" for record in records))
    packed = tmp_path / "packed.jsonl.zst"
    with pyarrow.output_stream(packed, compression="zstd") as stream:
        stream.write(plain.read_bytes())
    rows = read_rows(checkpoint, [plain], 6000)[plain]
    assert torch.equal(rows, read_rows(checkpoint, [packed], 6000)[packed])
    assert {ord(letter) for letter in "abc"} <= set(rows.flatten().tolist())


@pytest.mark.parametrize(
    ("content", "options", "named"),
    [
        (None, {}, "--calibration FILE"),
        ("short", {}, r"text\.txt: only 5 tokens"),
        (b"\xff\xfe\xfa" * 99, {}, r"text\.txt: cannot be read"),
        ("word " * 500, {"moe_intermediate_size": 5}, "--moe-intermediate-size 5 .*at least 6"),
        ("word " * 500, {"moe_intermediate_size": 40}, "--moe-intermediate-size 40 .*no shared expert"),
        ("word " * 500, {"calibration_tokens": -1}, "--calibration-tokens -1"),
        ("word " * 500, {"strategy": "exact"}, "--calibration .*leave it out"),
    ],
)
def test_calibration_that_cannot_be(tmp_path, dense, content, options, named):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        options = {**options, "calibration": file}
    with pytest.raises(UserError, match=named) as refused:
        convert(dense, tmp_path / "out", **{"strategy": "calibrated", **options})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("options", [{}, {"norm_topk_prob": False, "shared_expert_intermediate_size": 24}], ids=str)
def test_the_reported_command_makes_the_same_weights(tmp_path, dense, options, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = convert(dense, tmp_path / "out", strategy="random", seed=5, **SIZES, **options)
    before = (output / "model.safetensors").read_bytes()
    command = next(line for line in (output / "README.md").read_text().splitlines() if line.startswith("mhmoe "))
    main([*shlex.split(command)[2:], "--overwrite"])
    assert (output / "model.safetensors").read_bytes() == before
    assert AutoModelForCausalLM.from_pretrained(output).config.norm_topk_prob is options.get("norm_topk_prob", True)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"strategy": "exact", "shared_expert_intermediate_size": 95}, "--shared-expert-intermediate-size 95.*96"),
        ({"shared_expert_intermediate_size": 96}, "--shared-expert-intermediate-size 96.*72"),
        ({"moe_intermediate_size": 5}, "--moe-intermediate-size 5 .*at least 6"),
        ({"norm_topk_prob": False}, "--no-norm-topk-prob"),
        ({"num_moe_heads": 1}, "--num-moe-heads 1 "),
        ({"num_moe_heads": 16}, "--num-moe-heads 16 .*even"),
        ({"num_moe_heads": 5}, "num_moe_heads=5 does not divide"),
        ({"num_moe_heads": 0}, "num_moe_heads=0"),
    ],
    ids=str,
)
def test_what_a_strategy_cannot_keep_is_refused(tmp_path, dense, options, named):
    with pytest.raises(UserError, match=named) as refused:
        convert(dense, tmp_path / "out", **{"strategy": "anchored", **SIZES, **options})
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "named"), [({"mlp_bias": True}, "mlp_bias"), ({"intermediate_size": 20}, "24 dense")]
)
def test_dense_models_that_cannot_be_anchored(tmp_path, fields, named):
    source = save_dense(tmp_path / "dense", **fields)
    with pytest.raises(UserError, match=named):
        convert(source, tmp_path / "out", strategy="anchored", **SIZES)


def test_anchored_without_a_shared_expert(tmp_path):
    source = save_dense(tmp_path / "dense", intermediate_size=24)
    output = convert(source, tmp_path / "out", strategy="anchored", **SIZES)
    assert not any("shared_expert" in name for name in weights_of(output))
    assert verify(source, output, max_tokens=64).broken_promises == []


FAMILY = [
    {"private_experts": True},
    {"router_input": "token"},
    {"moe_latent_size": 32, "private_experts": True, "router_input": "latent"},
    {"num_moe_heads": 1, "moe_latent_size": 16, "router_input": "token"},
]


@pytest.mark.parametrize("fields", FAMILY, ids=str)
def test_exact_and_random_make_the_layers_of_later_papers(tmp_path, dense, fields):
    asked = {**SIZES, **fields}
    exact = convert(dense, tmp_path / "exact", **asked)
    assert verify(dense, exact, max_tokens=64).broken_promises == []
    config = MHMoEConfig.from_pretrained(exact)
    assert {field: getattr(config, field) for field in asked} == asked
    sizes = json.loads((exact / "conversion.json").read_text())["sizes"]
    card = (exact / "README.md").read_text()
    assert ("heads, with each 6 routed experts" in card) is asked.get("private_experts", False)
    assert sizes.items() >= (asked.items() - {("router_input", asked.get("router_input"))})
    model = AutoModelForCausalLM.from_pretrained(exact)
    assert costs(config).parameters == model.num_parameters()
    input_ids = torch.arange(3, 35)[None]
    model(input_ids, labels=input_ids).loss.backward()
    assert model.model.layers[0].mlp.merge_layer.weight.grad.any()

    random = convert(dense, tmp_path / "random", strategy="random", **asked)
    assert verify(dense, random, max_tokens=64).broken_promises == []
    assert all(weight.any() for name, weight in weights_of(random).items() if ".mlp." in name)


@pytest.mark.parametrize("fields", FAMILY[:2], ids=str)
def test_anchored_keeps_its_promise_with_private_experts_and_routers_of_tokens(tmp_path, dense, fields):
    output = convert(dense, tmp_path / "out", strategy="anchored", **SIZES, **fields)
    assert verify(dense, output, max_tokens=64).broken_promises == []


def test_plan_says_that_experts_are_private(dense):
    planned = plan(dense, private_experts=True, router_input="token", num_moe_heads=4)
    assert re.search(r"routed experts per layer +4 x 8 +4 x 8 +4 x 8\n", planned.table())
    assert "--num-moe-heads 4 --private-experts --router-input token" in planned.commands["exact"]
    assert planned.unfit.keys() == {"calibrated"}


def test_later_papers_options_are_in_the_reported_command_and_matched(tmp_path, dense, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"match": "smoe", "private_experts": True, "router_input": "token", "moe_latent_size": 24}
    output = convert(dense, tmp_path / "out", num_moe_heads=2, num_experts_per_tok=1, **options)
    before = (output / "model.safetensors").read_bytes()
    command = next(line for line in (output / "README.md").read_text().splitlines() if line.startswith("mhmoe "))
    assert "--moe-latent-size 24" in command
    assert "--private-experts --router-input token" in command
    main([*shlex.split(command)[2:], "--overwrite"])
    assert (output / "model.safetensors").read_bytes() == before
    # 3 d ff multiply-adds are 2 d l + 3 l i, and the dense FFN stays beside them
    config = MHMoEConfig.from_pretrained(output)
    assert costs(config).ffn_multiply_adds == pytest.approx(2 * 2 * 3 * 48 * 96, rel=0.03)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (
            {"strategy": "anchored", "moe_latent_size": 24},
            "--moe-latent-size 24: strategy anchored makes no such layers",
        ),
        (
            {"strategy": "calibrated", "calibration": "t.txt", "private_experts": True},
            "--private-experts: strategy cal",
        ),
        (
            {"strategy": "calibrated", "calibration": "t.txt", "router_input": "token"},
            "--router-input token: strategy",
        ),
        ({"private_experts": True, "num_moe_heads": 1}, "private_experts=True needs heads"),
        ({"moe_latent_size": 30}, "num_moe_heads=4 does not divide moe_latent_size=30"),
        ({"router_input": "tokens"}, "router_input='tokens' is unknown; choose one of sub_token, token, latent"),
        (
            {"router_input": "token", "router_init": "kmeans", "calibration": "t.txt"},
            "--router-init kmeans makes rows",
        ),
    ],
    ids=str,
)
def test_layers_of_later_papers_that_a_strategy_cannot_start(tmp_path, dense, options, named):
    with pytest.raises(UserError, match=named) as refused:
        convert(dense, tmp_path / "out", **{**SIZES, **options})
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()
