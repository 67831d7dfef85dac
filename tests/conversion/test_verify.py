"""`mhmoe verify`: it measures what it says, and notices what is wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_dense
from transformers import AutoModelForCausalLM, AutoTokenizer

from mhmoe.conversion import VerificationError, convert, verify
from mhmoe.conversion.verify_command import main
from mhmoe.errors import UserError
from mhmoe.model_cards import sections


SMALL = {"num_moe_heads": 4, "num_experts": 4, "moe_intermediate_size": 8}


@pytest.fixture
def source(tmp_path):
    return save_dense(tmp_path / "dense")


@pytest.fixture
def output(source, tmp_path):
    return convert(source, tmp_path / "out", **SMALL)


def edit_weights(folder, **edits):
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name, edit in edits.items():
        weights[name] = edit(weights[name])
    save_file(weights, file, {"format": "pt"})


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_good_conversion_passes(source, output, dtype, capsys):
    main([str(source), str(output), "--dtype", dtype, "--max-tokens", "200"])
    printed = capsys.readouterr().out
    assert "keeps what strategy exact promises" in printed
    assert ("bfloat16" if dtype == "bfloat16" else "float32") in printed


def test_figures_are_those_of_a_plain_computation(source, output, tmp_path):
    edit_weights(output, **{"model.layers.1.mlp.merge_layer.weight": lambda weight: weight + 0.01})
    text = tmp_path / "text.txt"
    text.write_text("Figures are checked by other means, one row of a text. " * 2)
    verification = verify(source, output, text=text)

    ids = AutoTokenizer.from_pretrained(source)(text.read_text(), return_tensors="pt").input_ids
    logits = [AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (source, output)]
    assert verification.tokens == ids.numel()
    assert verification.max_logit_difference == pytest.approx((logits[0] - logits[1]).abs().max().item(), rel=1e-4)
    for perplexity, of in zip((verification.dense_perplexity, verification.mhmoe_perplexity), logits, strict=True):
        loss = torch.nn.functional.cross_entropy(of[0, :-1], ids[0, 1:])
        assert perplexity == pytest.approx(loss.exp().item(), rel=1e-5)
    assert verification.max_padded_logit_difference > 0
    assert len(verification.broken_promises) >= 2


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("model.layers.1.mlp.merge_layer.weight", lambda weight: weight + 0.01),
        ("model.layers.0.mlp.shared_expert.up_proj.weight", lambda weight: weight * 1.0001),
        ("model.norm.weight", lambda weight: weight * torch.nan),
    ],
)
def test_a_changed_weight_is_noticed(source, output, name, edit):
    edit_weights(output, **{name: edit})
    with pytest.raises(VerificationError, match=r"max .logit difference. without padding"):
        main([str(source), str(output)])


def test_a_lost_tensor_is_noticed(source, output):
    weights = load_file(output / "model.safetensors")
    del weights["model.layers.0.mlp.gate.weight"]
    save_file(weights, output / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError, match=r"missing keys, such as model\.layers\.0\.mlp\.gate\.weight"):
        verify(source, output)


def test_a_model_without_tokenizer_is_compared_on_random_tokens(source, tmp_path):
    for file in source.glob("tokenizer*"):
        file.unlink()
    assert verify(source, convert(source, tmp_path / "out", **SMALL)).broken_promises == []


def test_figures_are_kept_where_that_is_asked_for(source, output, capsys):
    card, report = (output / "README.md").read_text(), json.loads((output / "conversion.json").read_text())
    main([str(source), str(output)])
    assert (output / "README.md").read_text() == card
    assert json.loads((output / "conversion.json").read_text()) == report

    main([str(source), str(output), "--max-tokens", "64", "--update-card"])
    main([str(source), str(output), "--max-tokens", "96", "--update-card"])
    kept = json.loads((output / "conversion.json").read_text())
    verification = kept.pop("verification")
    assert kept == report
    assert verification["tokens"] == 96
    assert verification["max_logit_difference"] == 0
    figures = capsys.readouterr().out.rsplit("float32, strategy exact", 1)[1].rsplit("\n", 2)[0].strip()
    new_card = (output / "README.md").read_text()
    assert new_card.count("## Verified") == 1
    assert figures in new_card
    assert new_card.startswith(card.rstrip())

    (output / "README.md").unlink()
    with pytest.raises(UserError, match=r"README\.md: cannot be updated"):
        main([str(source), str(output), "--max-tokens", "64", "--update-card"])


def test_a_card_from_before_sections_had_marks(source, output):
    card = (output / "README.md").read_text()
    (output / "README.md").write_text(f"{card}\n## Verified\n\nold\n\n## Last\n\nend\n")
    for _ in range(2):
        main([str(source), str(output), "--max-tokens", "64", "--update-card"])
        new_card = (output / "README.md").read_text()
        assert new_card.startswith(card)
        assert new_card.endswith("\n## Last\n\nend\n")
        assert new_card.count("## Verified") == 1
        assert "old" not in sections.find(new_card, "verified")
        assert "float32, strategy exact" in sections.find(new_card, "verified")
    (output / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"README\.md: cannot be updated"):
        main([str(source), str(output), "--max-tokens", "64", "--update-card"])


def test_wrong_folders_and_texts(source, output, tmp_path):
    with pytest.raises(UserError, match=r"conversion\.json"):
        verify(source, source)
    with pytest.raises(UserError, match=r"nowhere\.txt"):
        verify(source, output, text=tmp_path / "nowhere.txt")
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(UserError, match=r"short\.txt: only 1 tokens"):
        verify(source, output, text=tmp_path / "short.txt")
    with pytest.raises(UserError, match="max_tokens=1"):
        verify(source, output, max_tokens=1)
    (output / "model.safetensors").write_bytes(b"garbage!" * 9)
    with pytest.raises(UserError, match="cannot be loaded"):
        verify(source, output)
    report = json.loads((output / "conversion.json").read_text())
    (output / "conversion.json").write_text(json.dumps({**report, "strategy": "magic"}))
    with pytest.raises(UserError, match="strategy='magic'"):
        verify(source, output)


def edit_json(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_how_a_model_would_generate_is_no_matter(source, output):
    for folder in (source, output):
        edit_json(folder / "generation_config.json", num_beams="many", repetition_penalty=3.0)
    assert verify(source, output, max_tokens=64).same_greedy_text


def test_source_that_would_give_tuples(source, tmp_path):
    edit_json(source / "config.json", return_dict=False)
    assert not verify(source, convert(source, tmp_path / "tuples", **SMALL), max_tokens=64).broken_promises


def test_source_with_few_positions(source, output):
    edit_json(source / "config.json", max_position_embeddings=34)
    with pytest.raises(UserError, match="max_position_embeddings=34 is too little"):
        verify(source, output)
