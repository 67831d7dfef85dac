"""What a calibration text teaches: which neurons stay, what the others' work becomes, where routers start."""

import hashlib
import json
import signal

import pytest
import torch
from cut_short import SMALL, contents, convert_and_die_inside_tensor, in_child
from dense_variants import VARIANTS, save_variant
from safetensors.torch import load_file
from tiny import save_dense
from transformers import AutoModelForCausalLM

from mhmoe import MHMoEConfig
from mhmoe.conversion import convert, verify
from mhmoe.conversion.calibration import LayerByLayer, dense_walk, read_rows
from mhmoe.conversion.checkpoint import DenseCheckpoint
from mhmoe.conversion.distillation import distil
from mhmoe.conversion.kmeans import router_rows
from mhmoe.conversion.pruning import keep_best
from mhmoe.conversion.tensors import DenseWeights
from mhmoe.errors import UserError
from mhmoe.modeling_mhmoe.modeling_mhmoe import MHMoESparseMoeBlock


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.jsonl"
    words = torch.randint(97, 123, (24, 300), generator=seeded(1))
    file.write_text("".join(json.dumps({"text": "".join(map(chr, row))}) + "\n" for row in words.tolist()))
    return file


@pytest.fixture
def ffn():
    """Gram matrix (40, 40) of correlated activations, and a down projection (12, 40)."""
    activations = torch.randn(500, 40, generator=seeded()) @ torch.randn(40, 40, generator=seeded(1)) + 1
    return activations.T @ activations, torch.randn(12, 40, generator=seeded(2))


def ridge_loss(gram, down, fitted, ridge):
    change = (fitted - down).double()
    penalised = gram.double() + ridge * gram.diagonal().double().diag()
    return (change @ penalised @ change.T).trace().item()


def test_refitted_columns_are_the_ridge_solution(ffn):
    gram, down = ffn
    kept, fitted = keep_best(gram, down, 30, ridge=0.2)
    lost = [neuron for neuron in range(40) if neuron not in kept.tolist()]
    assert len(lost) == 10
    assert not fitted[:, lost].any()
    left = gram[kept][:, kept].double() + 0.2 * gram.diagonal()[kept].double().diag()
    change = torch.linalg.solve(left, gram[kept][:, lost].double() @ down.T[lost].double())
    torch.testing.assert_close(fitted[:, kept], (down.T[kept] + change).T.float(), rtol=1e-4, atol=1e-4)


def test_the_neurons_that_go_are_missed_less_than_the_coldest(ffn):
    gram, down = ffn
    _, fitted = keep_best(gram, down, 30, ridge=0.2)
    coldest = (gram.diagonal().sqrt() * down.norm(dim=0)).argsort()[:10].tolist()
    kept = [neuron for neuron in range(40) if neuron not in coldest]
    others = torch.zeros_like(down)
    left = gram[kept][:, kept] + 0.2 * gram.diagonal()[kept].diag()
    others[:, kept] = down[:, kept] + torch.linalg.solve(left, gram[kept][:, coldest] @ down.T[coldest]).T
    assert ridge_loss(gram, down, fitted, 0.2) < 0.97 * ridge_loss(gram, down, others, 0.2)


def test_a_huge_ridge_keeps_the_hottest_as_they_are(ffn):
    gram, down = ffn
    kept, fitted = keep_best(gram, down, 30, ridge=1e9)
    hottest = (gram.diagonal().sqrt() * down.norm(dim=0)).argsort(descending=True)[:30]
    assert kept.tolist() == hottest.tolist()
    torch.testing.assert_close(fitted[:, kept], down[:, kept])


def test_neurons_that_never_fire_go_first(ffn):
    gram, down = ffn
    gram[5], gram[:, 5] = 0, 0
    kept, fitted = keep_best(gram, down, 39, ridge=0.2)
    assert 5 not in kept
    torch.testing.assert_close(fitted[:, kept], down[:, kept])


def loads(rows, points, top_k):
    picked = (points @ rows.T).topk(top_k, dim=1).indices
    return torch.bincount(picked.flatten(), minlength=len(rows)) * len(rows) / picked.numel()


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_neurons_of_any_size(scale):
    """Where none ever fires, as behind a norm of zeros, all are as good, and keep their columns."""
    gram, down = torch.eye(40) * scale, torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
    kept, fitted = keep_best(gram, down, 30, ridge=0.2)
    assert sorted(set(kept.tolist())) == sorted(kept.tolist())
    assert len(kept) == 30
    assert torch.allclose(fitted[:, kept], down[:, kept], rtol=1e-3)


def test_router_rows_are_clusters_of_even_load():
    centres = 4 * torch.randn(8, 16, generator=seeded(3))
    cluster = torch.randint(8, (4000,), generator=seeded(4))
    points = centres[cluster] + torch.randn(4000, 16, generator=seeded(5)) + 3
    rows = router_rows(points, 8, 1, seeded())
    assert rows.shape == (8, 16)
    assert rows.mean(dim=0).abs().max() < 1e-6
    picked = (points @ rows.T).argmax(dim=1)
    purity = sum(torch.bincount(picked[cluster == own], minlength=8).max().item() for own in range(8)) / 4000
    assert purity > 0.8
    unseen = torch.randn(4000, 16, generator=seeded(6)) @ torch.randn(16, 16, generator=seeded(7)) + 3
    even, random = (
        loads(rows, unseen, 2)
        for rows in (router_rows(unseen[:2000], 8, 2, seeded()), torch.randn(8, 16, generator=seeded()))
    )
    assert even.max() < 1.3 < random.max()


@pytest.mark.parametrize(
    "points", [torch.zeros(3, 4), torch.ones(50, 4), torch.randn(2, 4)], ids=["zero", "one", "few"]
)
def test_router_rows_differ_whatever_the_text(points):
    rows = router_rows(points, 8, 2, seeded())
    assert rows.isfinite().all()
    assert torch.cdist(rows, rows).add(torch.eye(8)).min() > 1e-4
    assert rows.norm(dim=1).min() > 0


def test_distillation_comes_near_its_target_and_repeats_itself():
    sizes = {"num_moe_heads": 2, "num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 16}
    config = MHMoEConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, norm_topk_prob=True, **sizes)
    config._experts_implementation = "eager"
    inputs = torch.randn(600, 16, generator=seeded())
    targets = torch.nn.functional.silu(inputs @ torch.randn(16, 16, generator=seeded(1)))
    errors, trained = [], []
    for _ in range(2):
        torch.manual_seed(0)
        block = MHMoESparseMoeBlock(config)
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        errors.append((block(inputs[None])[0] - targets).norm() / targets.norm())
        with torch.no_grad():  # as the conversion calls it
            distil(block, inputs, targets, torch.ones(600, 1), 800, seeded())
        errors.append((block(inputs[None])[0] - targets).norm() / targets.norm())
        trained.append(block.state_dict())
    assert errors[1] < 0.6 * errors[0]
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


def test_tokens_of_no_weight_teach_nothing():
    block = torch.nn.Linear(4, 4, bias=False)
    inputs = torch.randn(200, 4, generator=seeded())
    targets = inputs.clone()
    targets[100:] *= -50
    weights = torch.ones(200, 1)
    weights[100:] = 0
    torch.nn.init.zeros_(block.weight)
    distil(block, inputs, targets, weights, 3000, seeded())
    torch.testing.assert_close(block.weight, torch.eye(4), rtol=0, atol=0.02)


@torch.no_grad()
@pytest.mark.parametrize("variant", [name for name, (_, fields, _) in VARIANTS.items() if "mlp_bias" not in fields])
def test_the_walk_is_the_dense_model_in_every_family(tmp_path, text, variant):
    checkpoint = DenseCheckpoint(save_variant(tmp_path / "dense", variant))
    rows = read_rows(checkpoint, [text], 600)[text]
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    seen = []
    for layer in dense.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    dense(rows)

    weights = DenseWeights(checkpoint, convert_shapes(tmp_path, checkpoint))
    walk = LayerByLayer(lambda: dense_walk(checkpoint.config, rows, weights.load))
    for layer in (*range(len(seen)), 1):  # to an earlier layer it starts again
        torch.testing.assert_close(torch.stack(list(walk[layer].inputs())), seen[layer], rtol=1e-4, atol=1e-5)


def convert_shapes(tmp_path, checkpoint):
    output = convert(checkpoint.folder, tmp_path / "exact", num_moe_heads=4, num_experts=2, moe_intermediate_size=8)
    return {
        name: tuple(tensor.shape) for name, tensor in AutoModelForCausalLM.from_pretrained(output).state_dict().items()
    }


@pytest.mark.parametrize("variant", ["mistral", "qwen2", "qwen3", "smollm3", "cwm"])
def test_calibrated_in_every_family(tmp_path, text, variant):
    source = save_variant(tmp_path / "dense", variant)
    output = convert(
        source, tmp_path / "out", strategy="calibrated", num_experts=3, calibration=text, calibration_tokens=900
    )
    errors = json.loads((output / "conversion.json").read_text())["figures"]["held_out_relative_error"]
    assert len(errors) == 3
    assert all(layer["refitted"] < 1 for layer in errors)
    assert verify(source, output, max_tokens=64).broken_promises == []


@pytest.mark.parametrize("strategy", ["exact", "anchored"])
def test_a_router_from_text_changes_no_logit_and_evens_the_load(tmp_path, text, strategy):
    source = save_dense(tmp_path / "dense")
    sizes = {"num_moe_heads": 4, "num_experts": 6, "moe_intermediate_size": 8}
    options = {"calibration": text, "calibration_tokens": 4000, "router_init": "kmeans"}
    clustered = convert(source, tmp_path / "kmeans", strategy=strategy, **sizes, **options)
    plain = convert(source, tmp_path / "random", strategy=strategy, **sizes)
    assert verify(source, clustered, max_tokens=96).broken_promises == []
    new, old = (load_file(folder / "model.safetensors") for folder in (clustered, plain))
    assert {name for name in new if not torch.equal(new[name], old[name])} == {
        f"model.layers.{layer}.mlp.gate.weight" for layer in range(2)
    }

    rows = read_rows(DenseCheckpoint(source), [text], 4000)[text]
    unevenness = []
    for folder in (clustered, plain):
        model = AutoModelForCausalLM.from_pretrained(folder)
        logits = model(rows, output_router_logits=True).router_logits  # four heads of a layer, then those of the next
        layers = [torch.cat(logits[first : first + 4]) for first in (0, 4)]
        shares = [torch.bincount(layer.topk(2).indices.flatten(), minlength=6).float() for layer in layers]
        unevenness.append(max((share.max() / share.mean()).item() for share in shares))
    assert unevenness[0] < 1.4 < unevenness[1]


def test_the_report_says_which_text(tmp_path, text):
    source = save_dense(tmp_path / "dense")
    options = {"calibration": text, "calibration_tokens": 2000, "router_init": "kmeans", "distillation_steps": 0}
    output = convert(source, tmp_path / "out", strategy="calibrated", num_experts=3, **options)
    report = json.loads((output / "conversion.json").read_text())
    digest = hashlib.sha256(text.read_bytes()).hexdigest()
    assert report["calibration"] == [{"file": "text.jsonl", "sha256": digest, "tokens": 2000}]
    assert report["figures"]["held_out_relative_error"][0].keys() == {"kept", "refitted"}
    for words in ("--calibration text.jsonl --calibration-tokens 2000", "--router-init kmeans --distillation-steps 0"):
        assert words in report["command"]
    card = (output / "README.md").read_text()
    assert digest in card
    errors = [layer["refitted"] for layer in report["figures"]["held_out_relative_error"]]
    assert f"after the ridge regression: {sum(errors) / len(errors):.3f}" in card
    assert "after distillation" not in card


def test_texts_share_the_tokens(tmp_path, text):
    """Each mention of a text has one share; the shares are in the report, the card and the command."""
    source = save_dense(tmp_path / "dense")
    other = tmp_path / "other.txt"
    other.write_text("UPPER CASE " * 400)
    files = [text, other, text]
    rows = read_rows(DenseCheckpoint(source), files, 3000)
    width = rows[text].shape[1]
    assert rows[other].shape[1] == width
    assert 2000 - width < rows[text].numel() <= 2000
    assert 1000 - width < rows[other].numel() <= 1000
    assert not set(map(ord, "UPER")) & set(rows[text].flatten().tolist())
    assert set(rows[other].flatten().tolist()) == set(map(ord, "UPPER CASE"))

    options = {"calibration_tokens": 3000, "distillation_steps": 5, "num_experts": 3, "strategy": "calibrated"}
    output = convert(source, tmp_path / "out", calibration=files, **options)
    report = json.loads((output / "conversion.json").read_text())
    assert report["calibration"] == [
        {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "tokens": rows[file].numel()}
        for file in (text, other)
    ]
    assert "--calibration text.jsonl --calibration other.txt --calibration text.jsonl" in report["command"]
    card = (output / "README.md").read_text()
    assert " tokens of `text.jsonl` (SHA-256 `" in card
    assert " tokens of `other.txt` (SHA-256 `" in card
    one = convert(source, tmp_path / "one", calibration=text, **options)
    assert contents(one)["model.safetensors"] != contents(output)["model.safetensors"]


@pytest.mark.parametrize(
    ("characters", "tokens", "named"),
    [
        (70, 3000, r"other\.txt: only 70 tokens; give a longer --calibration"),
        (5000, 127, r"--calibration-tokens 127 is too few; give at least 128"),
    ],
)
def test_texts_that_cannot_share(tmp_path, text, characters, tokens, named):
    other = tmp_path / "other.txt"
    other.write_text("x" * characters)
    with pytest.raises(UserError, match=named):
        read_rows(DenseCheckpoint(save_dense(tmp_path / "dense")), [text, other], tokens)


@pytest.mark.parametrize("number", [3, 14, 22])
def test_calibrated_is_resumed_to_the_byte(tmp_path, text, number, monkeypatch):
    monkeypatch.setitem(SMALL, "moe_intermediate_size", 12)
    dense, output = save_dense(tmp_path / "dense"), tmp_path / "out"
    options = {"strategy": "calibrated", "calibration": text, "calibration_tokens": 900, "distillation_steps": 5}

    def finish(**more):
        convert(dense, output, **SMALL, **options, **more)

    assert in_child(finish) == 0
    expected = contents(output)
    killed = in_child(convert_and_die_inside_tensor, number, dense, output, overwrite=True, **options)
    assert killed == -signal.SIGKILL
    assert in_child(finish, resume=True, overwrite=True) == 0
    assert contents(output) == expected


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"strategy": "exact", "router_init": "kmeans"}, "--router-init kmeans .*--calibration"),
        (
            {"strategy": "random", "router_init": "kmeans", "calibration": True},
            "--router-init kmeans: strategy random",
        ),
        ({"strategy": "calibrated", "calibration": True, "distillation_steps": -1}, "--distillation-steps -1"),
        ({"strategy": "exact", "router_init": "magic"}, "router_init='magic'"),
    ],
    ids=str,
)
def test_what_cannot_be(tmp_path, text, options, named):
    if "calibration" in options:
        options = {**options, "calibration": text}
    with pytest.raises(UserError, match=named) as refused:
        convert(save_dense(tmp_path / "dense"), tmp_path / "out", **options)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_text_in_json_lines_is_read_as_that_of_training(tmp_path):
    source = save_dense(tmp_path / "dense")
    file = tmp_path / "text.jsonl"
    lines = [
        "",
        json.dumps({"text": "a text to learn from " * 40, "other": None}),
        '{"id": ' + "9" * 5000 + ', "text": "b"}',
    ]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, ""]).encode())
    assert read_rows(DenseCheckpoint(source), [file], 400)[file].numel() > 350
    file.write_text('{"text": "a"}\n{"text": null}')
    with pytest.raises(UserError, match=r'text\.jsonl: line 2 has no field "text"'):
        read_rows(DenseCheckpoint(source), [file], 400)
    (tmp_path / "text.jsonl.xz").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"text\.jsonl\.xz: cannot be read as text"):
        read_rows(DenseCheckpoint(source), [tmp_path / "text.jsonl.xz"], 400)
