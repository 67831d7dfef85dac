"""Shared experts that lose neurons: which, when, and that the tensors without them say the same."""

import json
from pathlib import Path

import pytest
import torch
from one_step import random_rows
from tiny import save_dense, tiny_model, tiny_tokenizer
from training_runs import documents, options, weights_of, write_jsonl
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from mhmoe.errors import UserError
from mhmoe.training import NarrowingCallback, causal_batch
from mhmoe.training.train_command import main


WIDE, NARROW = 32, 12


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model(shared_expert_intermediate_size=WIDE, pad_token_id=None).save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    Path("model", "README.md").write_text("# A model\n")
    write_jsonl(tmp_path / "train.jsonl", documents(30))
    (tmp_path / "validation.txt").write_text(documents(1, 300)[0])
    return tmp_path


def run(model, folder, rows, steps: int, learning_rate: float, share: float = 1.0, **settings) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=steps,
        learning_rate=learning_rate,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    callback = NarrowingCallback(NARROW, share)
    trainer = Trainer(model, arguments, data_collator=causal_batch, train_dataset=rows, callbacks=[callback])
    trainer.train()
    return trainer


def rows_of(number: int) -> list[dict]:
    return [{"input_ids": row["input_ids"].tolist()} for seed in range(number) for row in random_rows(seed, 24)[:1]]


def shared_experts(model) -> list[torch.nn.Module]:
    return [layer.mlp.shared_expert for layer in model.model.layers if hasattr(layer.mlp, "shared_expert")]


@pytest.mark.parametrize("gated_mlp", [True, False])
def test_the_neurons_that_matter_least_go_first(tmp_path, gated_mlp):
    variant = {"gated_mlp": gated_mlp, "mlp_bias": not gated_mlp}
    model = tiny_model(shared_expert_intermediate_size=WIDE, **variant)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = [[] for _ in shared_experts(model)]
    for expert, inputs in zip(shared_experts(model), seen, strict=True):
        expert.down_proj.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0]))
    run(model, tmp_path, rows_of(2), steps=1, learning_rate=0.0)

    layers = [number for number, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "shared_expert")]
    assert layers
    for layer, (activation,) in zip(layers, seen, strict=True):
        prefix = f"model.layers.{layer}.mlp.shared_expert."
        down = before[prefix + "down_proj.weight"]
        matters = activation.flatten(0, 1).double().square().mean(0).sqrt() * down.double().norm(dim=0)
        kept = matters.argsort(descending=True)[:NARROW].sort().values
        for name, tensor in model.state_dict().items():
            if not name.startswith(prefix):
                continue
            old = before[name]
            dim = 1 if name.endswith("down_proj.weight") else 0
            assert torch.equal(tensor, old if name.endswith("down_proj.bias") else old.index_select(dim, kept)), name
    assert model.config.shared_expert_intermediate_size == NARROW


def test_fewer_after_each_step_and_none_comes_back(tmp_path):
    model = tiny_model(shared_expert_intermediate_size=WIDE)
    left = []

    def count(*_):
        left.append([int(expert.down_proj.weight.ne(0).any(0).sum()) for expert in shared_experts(model)])

    model.register_forward_pre_hook(count)
    run(model, tmp_path, rows_of(12), steps=6, learning_rate=1e-2, share=0.5, weight_decay=0.1)
    # 12 + 20 (1 - t)^3 for t = 1/3, 2/3 and 1
    assert left == [[number] * len(left[0]) for number in (32, 18, 13, 12, 12, 12)]


def test_the_command_saves_a_narrow_model_that_says_what_the_wide_one_did(folder):
    main(options(shared_expert_intermediate_size=NARROW, save_strategy="steps", save_steps=4))
    config = json.loads(Path("output", "config.json").read_text())
    assert config["shared_expert_intermediate_size"] == NARROW
    narrow, wide = (AutoModelForCausalLM.from_pretrained(place) for place in ("output", "output/checkpoint-4"))
    assert wide.config.shared_expert_intermediate_size == WIDE
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.allclose(narrow(tokens).logits, wide(tokens).logits, atol=1e-6)
    assert sum(map(torch.numel, narrow.parameters())) < sum(map(torch.numel, wide.parameters()))
    assert "lost neurons in the first 50% of the steps, until 12 were left" in Path("output", "README.md").read_text()


def test_resumed_as_if_it_had_not_stopped(folder):
    flags = {"shared_expert_intermediate_size": NARROW, "save_steps": 2, "narrowing_share": 1.0}
    main(options(**flags))
    main(options("--resume_from_checkpoint", "output/checkpoint-2", **flags, output_dir="again"))
    whole, resumed = weights_of("output"), weights_of("again")
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"shared_expert_intermediate_size": WIDE}, "must be at least 1 and below the model's, 32"),
        ({"shared_expert_intermediate_size": 0}, "must be at least 1"),
        ({"narrowing_share": 0}, "narrowing_share=0 must be above 0"),
        ({"narrowing_share": "nan"}, "narrowing_share=nan must be above 0"),
        ({"load_best_model_at_end": True, "save_steps": 2, "eval_steps": 2, "eval_strategy": "steps"}, "load_best"),
        ({"fsdp": "full_shard"}, "each process needs whole tensors"),
    ],
)
def test_what_cannot_be(folder, flags, message):
    with pytest.raises(UserError, match=message):
        main(options(**{"shared_expert_intermediate_size": NARROW, **flags}))
    assert not Path("output").exists()


def test_a_model_without_shared_experts(folder):
    save_dense(folder / "dense")
    with pytest.raises(UserError, match="shared_expert_intermediate_size=12: the model has no shared expert"):
        main(["dense", *options(shared_expert_intermediate_size=NARROW)[1:]])
