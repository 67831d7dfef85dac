"""`mhmoe pretrain`: the rows and their order, the tokenizer, the run and its report."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny import perplexity_in_blocks, tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, TrainingArguments
from transformers import trainer as transformers_trainer

from mhmoe.errors import UserError
from mhmoe.training import PretrainArguments, pretrain_command
from mhmoe.training.card import write_pretrained_card
from mhmoe.training.data import pack
from mhmoe.training.evaluation_budget import evaluation_rows
from mhmoe.training.rows import data_order, pack_in_shares, shuffled_pieces, train_tokenizer


WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "us", "while", "rain", "fell", "outside"]
TINY = "hidden_size=24,num_hidden_layers=2,num_attention_heads=2"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write_jsonl(name: str, number: int, seed: int) -> None:
    generator = random.Random(seed)
    rows = [json.dumps({"text": " ".join(generator.choices(WORDS, k=40))}) for _ in range(number)]
    Path(name).write_text("\n".join(rows))


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """The working directory of a user: a tokenizer, texts to train on and one to validate on."""
    monkeypatch.chdir(tmp_path)
    tiny_tokenizer().save_pretrained("tokenizer")
    write_jsonl("train.jsonl", 60, seed=0)
    write_jsonl("more.jsonl", 8, seed=1)
    write_jsonl("validation.jsonl", 4, seed=2)
    return tmp_path


def run(*arguments: str, **flags) -> dict:
    """`mhmoe pretrain` for four steps of 4 x 32 tokens, in this process; its report."""
    defaults = {
        "preset": "p2-mhmoe-head2",
        "config_overrides": TINY,
        "tokenizer_name": "tokenizer",
        "train_file": "train.jsonl",
        "validation_file": "validation.jsonl",
        "output_dir": "output",
        "block_size": 32,
        "num_train_tokens": 512,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "eval_steps": 2,
        "max_eval_samples": 128,
        "save_steps": 2,
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
    }
    given = {name: value for name, value in {**defaults, **flags}.items() if value is not None}
    parts = (part for name, value in given.items() for part in (f"--{name}", *str(value).split(" ")))
    pretrain_command.main([*arguments, *parts])
    return json.loads(Path(given["output_dir"], "pretraining.json").read_text())


# the rows


def test_order_is_in_equal_shares_and_the_seeds_alone():
    order = data_order([5, 100], total=15, seed=0)
    assert len(order) == 15
    assert all(row < 5 for row in order[::2])
    assert all(5 <= row < 105 for row in order[1::2])
    first, second = order[:10:2], order[10::2]  # the short text comes round again, in another order
    assert sorted(first) == [0, 1, 2, 3, 4]
    assert len(set(second)) == 3
    assert len(set(order[1::2])) == 7
    torch.manual_seed(5)
    assert data_order([5, 100], total=15, seed=0) == order
    assert data_order([5, 100], total=15, seed=1) != order


def test_rows_kept_for_validation_are_not_trained_on():
    generator = random.Random(0)
    texts = [Dataset.from_dict({"text": generator.choices("abcdefgh", k=200)}) for _ in range(2)]
    texts = [text.map(lambda row: {"text": row["text"] * generator.randrange(1, 9)}) for text in texts]
    packed = [pack(text, tiny_tokenizer(), 8)["input_ids"][:] for text in texts]
    train, validation = pack_in_shares(texts, [], tiny_tokenizer(), 8, train_rows=20, validation_rows=6, seed=0)
    assert [rows["input_ids"][:] for rows in validation] == [packed[0][:3], packed[1][:3]]
    assert sorted(train["input_ids"][:]) == sorted(packed[0][3:13] + packed[1][3:13])

    train, validation = pack_in_shares(texts[:1], texts[1:], tiny_tokenizer(), 8, 20, None, seed=0)
    assert validation[0]["input_ids"][:] == packed[1]
    assert sorted(train["input_ids"][:]) == sorted(packed[0][:20])
    _, validation = pack_in_shares(texts[:1], texts[1:], tiny_tokenizer(), 8, 20, 3, seed=0)
    rows = len(packed[1])
    assert validation[0]["input_ids"][:] == [packed[1][index] for index in (0, rows // 3, 2 * rows // 3)]


def test_documents_are_cut_into_shuffled_pieces():
    books = [letter * 95 for letter in "abcd"]
    pieces = shuffled_pieces(Dataset.from_dict({"text": [*books, None, ""]}), 10)["text"][:]
    assert sorted(pieces) == sorted(letter * length for letter in "abcd" for length in [10] * 9 + [5])
    assert len({piece[0] for piece in pieces[:8]}) > 2
    assert shuffled_pieces(Dataset.from_dict({"text": books}), 10)["text"][:] == pieces


def test_every_model_sees_the_same_rows(files, monkeypatch):
    seen = []
    prepare = torch.nn.Embedding.forward

    def record(self, input_ids):
        if self.training:
            seen[-1].append(input_ids)
        return prepare(self, input_ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", record)
    for preset in ("p2-dense", "p2-mhmoe-head3"):
        seen.append([])
        run(preset=preset, output_dir=preset, train_file="train.jsonl more.jsonl")
    seen.append([])
    run(output_dir="another", train_file="train.jsonl more.jsonl", data_seed=1)
    first, second, third = (torch.cat(rows) for rows in seen)
    assert first.shape == (16, 32)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


# the tokenizer


def test_trained_tokenizer_gives_every_text_back(files):
    texts = [Dataset.from_dict({"text": [" ".join(WORDS) * 9]}), Dataset.from_dict({"text": ["zebra " * 99, None]})]
    tokenizer = train_tokenizer(texts, vocab_size=300, model_max_length=64)
    assert len(tokenizer) == 300
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, None)
    text = "The cat\n\nsat   on\u2028\U0001f408 ''"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(" zebra")["input_ids"]) == 1
    tokenizer.save_pretrained("trained")
    assert AutoTokenizer.from_pretrained("trained")(text) == tokenizer(text)
    only_the_first = train_tokenizer(texts, vocab_size=300, model_max_length=64, characters=20)
    assert len(only_the_first(" looked")["input_ids"]) > 1


def test_run_with_a_tokenizer_of_its_own(files):
    options = {"tokenizer_name": None, "vocab_size": 280, "validation_file": None, "max_eval_samples": 3}
    report = run(document_characters=50, **options)
    config = json.loads(Path("output/config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained("output")
    assert config["vocab_size"] == len(tokenizer) == 280
    assert config["eos_token_id"] == tokenizer.eos_token_id == 0
    assert config["pad_token_id"] is None
    assert report["validation_tokens"] == 3 * 31


# the run


def plain_perplexity(folder: str, file: str, block_size: int) -> float:
    tokenizer, token_ids = AutoTokenizer.from_pretrained(folder), []
    for line in Path(file).read_text().splitlines():
        token_ids += [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]
    return perplexity_in_blocks(folder, token_ids, block_size)


def test_report(files, capsys):
    report = run(num_train_tokens=700)  # five steps and a bit
    assert [point["tokens"] for point in report["curve"]] == [0, 256, 512, 640]
    last = report["curve"][-1]["perplexity"]
    assert last == pytest.approx(plain_perplexity("output", "validation.jsonl", 32), rel=1e-4)
    assert last < report["curve"][0]["perplexity"] / 1.5
    assert f"{last:.4f} after" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained("output")
    assert report["parameters"] == model.num_parameters()
    assert report["tokens_per_second"] > 0
    assert (report["finished"], report["model"], report["seed"]) == (True, "p2-mhmoe-head2", 42)
    assert model.config.max_position_embeddings == 32
    assert model.config.vocab_size == 128
    assert (model.config.hidden_size, model.config.moe_intermediate_size) == (24, 24)
    assert model.config.use_cache
    saved = {path.name for path in Path("output").iterdir()}
    assert {"model.safetensors", "modeling_mhmoe.py", "tokenizer.json", "README.md", "checkpoint-5"} <= saved
    assert f"{last:.3f}" in Path("output/README.md").read_text()


@pytest.mark.parametrize("preset", ["p2-mhmoe-head2", "p2-mhmoe-head2-shared-1bit", "p1-mhmoe-8"])
def test_resumed_run_ends_where_an_undisturbed_one_does(files, preset):
    options = {"preset": preset, "tokenizer_name": None, "vocab_size": 280}
    undisturbed = run(output_dir="undisturbed", **options)
    run(output_dir="resumed", save_total_limit=2, **options)
    shutil.rmtree("resumed/checkpoint-4")
    Path("resumed/model.safetensors").unlink()
    resumed = run("--resume_from_checkpoint", "true", output_dir="resumed", **options)
    assert resumed["curve"] == undisturbed["curve"]
    expected, weights = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in ("undisturbed", "resumed")
    )
    for name, weight in expected.items():
        assert torch.equal(weight, weights[name]), name
    assert undisturbed["curve"][-1]["perplexity"] == pytest.approx(
        plain_perplexity("undisturbed", "validation.jsonl", 32), rel=1e-4
    )


def test_output_is_only_written_over_when_asked(files):
    run(num_train_tokens=128)
    with pytest.raises(UserError, match="output_dir=output: is not empty"):
        run()
    report = run("--overwrite")
    assert not Path("output/checkpoint-1").exists()
    assert f"{report['curve'][-1]['perplexity']:.3f}" in Path("output/README.md").read_text()


def test_run_of_a_config_from_a_folder(files):
    tiny_config(num_experts=4).save_pretrained("config")
    report = run(
        preset=None,
        config_name="config",
        config_overrides="num_experts=5,mlp_only_layers=[0]",
        max_steps=1,
        num_train_tokens=None,
    )
    config = AutoModelForCausalLM.from_pretrained("output").config
    assert (config.num_experts, config.moe_layers, config.num_moe_heads) == (5, [1], 2)
    assert [point["tokens"] for point in report["curve"]] == [0, 128]


def test_each_of_several_texts_is_measured_in_the_end(files):
    Path("validation.jsonl").rename("eval.jsonl")
    report = run(train_file="train.jsonl more.jsonl", validation_file="eval.jsonl more.jsonl")
    for name in ("eval", "more"):
        assert report["texts"][name] == pytest.approx(plain_perplexity("output", f"{name}.jsonl", 32), rel=1e-4)
    assert min(report["texts"].values()) < report["curve"][-1]["perplexity"] < max(report["texts"].values())
    assert [point["tokens"] for point in report["curve"]] == [0, 256, 512]
    report = run(train_file="train.jsonl more.jsonl", validation_file=None, max_eval_samples=4, output_dir="held-out")
    assert list(report["texts"]) == ["train", "more"]


# what is left behind


def test_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(files, caplog):
    undisturbed = run(output_dir="undisturbed")
    run("--save-total-limit", "2")
    optimizer = Path("output/checkpoint-4/optimizer.pt")
    optimizer.write_bytes(optimizer.read_bytes()[:1000])
    resumed = run("--resume-from-checkpoint", "true")
    assert resumed["curve"] == undisturbed["curve"]
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("mhmoe")]
    assert messages[0].startswith("output/checkpoint-4: is not whole and skipped (optimizer.pt is cut off")
    expected, weights = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in ("undisturbed", "output")
    )
    for name, weight in expected.items():
        assert torch.equal(weight, weights[name]), name


def test_run_killed_after_its_last_checkpoint(files):
    """There is nothing to train any more, and nothing to evaluate: all that is reported is in the checkpoint."""
    undisturbed = run()
    card = Path("output/README.md").read_text()
    for file in ("README.md", "pretraining.json", "model.safetensors"):
        Path("output", file).unlink()
    resumed = run("--resume-from-checkpoint", "true")
    assert resumed["finished"]
    assert resumed["curve"] == undisturbed["curve"]
    assert Path("output/README.md").read_text() == card


def test_push_that_fails_leaves_the_model(files, monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("no network")

    hub = type("Hub", (), {"create_repo": lambda *_, **__: type("Url", (), {"repo_id": "a/b"}), "upload_folder": fail})
    monkeypatch.setattr(transformers_trainer, "hf_api", hub)
    with pytest.raises(UserError, match=r"push_to_hub: failed \(no network\).*hf upload a/b output"):
        run(push_to_hub=True, hub_strategy="end", max_steps=1, num_train_tokens=None)
    assert AutoModelForCausalLM.from_pretrained("output")
    assert json.loads(Path("output/pretraining.json").read_text())["finished"]


def test_no_paths_in_what_is_published(files):
    tiny_config().save_pretrained("own")
    (files / "a").mkdir()
    shutil.copy("more.jsonl", files / "a" / "train.jsonl")
    report = run(
        preset=None,
        config_overrides=None,
        output_dir=files / "output",
        tokenizer_name=files / "tokenizer",
        train_file=f"{files / 'train.jsonl'} {files / 'a' / 'train.jsonl'}",
        validation_file=f"{files / 'train.jsonl'} {files / 'a' / 'train.jsonl'}",
        config_name=files / "own",
    )
    assert report["model"] == "own"
    assert list(report["texts"]) == ["train.jsonl", "a/train.jsonl"]
    for name in ("pretraining.json", "README.md", "config.json", "tokenizer_config.json"):
        assert str(files) not in (files / "output" / name).read_text(), name


def test_names_in_the_card_are_escaped(tmp_path):
    figures = {"model_type": "mhmoe", "model": "a`b\n# c", "config_overrides": "d=`e`", "seed": 1}
    curve = [{"tokens": 0, "perplexity": 1.0}]
    folder = tmp_path / "[x](y) *z*"
    folder.mkdir()
    write_pretrained_card(folder, {**figures, "curve": curve, "validation_tokens": 1, "parameters": 1})
    card = (folder / "README.md").read_text()
    assert "\n# \\[x\\](y) \\*z\\*\n" in card
    assert r"``a`b\n# c`` with `` d=`e` ``, seed 1." in card


# how much of a run is evaluation


def evaluation_share(report: dict, evaluations: int | None = None) -> float:
    """Tokens that a run read to be evaluated, to tokens that it was trained on."""
    trained = report["curve"][-1]["tokens"]
    return (evaluations or len(report["curve"])) * report["validation_tokens"] / trained


def test_short_run_is_not_mostly_evaluation(files, caplog):
    write_jsonl("large.jsonl", 400, seed=3)
    options = {"eval_steps": 0.1, "save_strategy": "no"}
    run(
        num_train_tokens=8192,
        train_file="large.jsonl",
        validation_file="large.jsonl",
        max_eval_samples=None,
        **options,
    )
    (line,) = (record.getMessage() for record in caplog.records if record.name.startswith("mhmoe"))
    assert "the model is evaluated 2 times on 128 blocks of 32 tokens" in line
    report = json.loads(Path("output/pretraining.json").read_text())
    assert report["validation_tokens"] == 128 * 31
    assert [point["tokens"] for point in report["curve"]] == [0, 8192]
    assert evaluation_share(report) < 1
    caplog.clear()
    wanted = run(output_dir="wanted", num_train_tokens=512, train_file="large.jsonl", max_eval_samples=200, **options)
    assert (len(wanted["curve"]), wanted["validation_tokens"]) == (5, 23 * 31)  # all there is, as often as by default
    assert not [record for record in caplog.records if record.name.startswith("mhmoe")]


@pytest.mark.parametrize(
    ("flags", "train_rows", "texts", "expected"),
    [
        # 10 evaluations and the one before training, of 100,000 rows: more than are held out
        ({}, 100_000, 0, (128, 0.1)),
        ({}, 100_000, 1, (100_000 // 11, 0.1)),
        ({}, 1100, 0, (100, 0.1)),
        ({}, 1100, 1, (100, 0.1)),
        ({}, 1200, 2, (100, 0.1)),  # one more at the end, of each text
        # 4 rows of 1024 tokens are the least
        ({}, 44, 0, (4, 0.1)),
        ({}, 43, 0, (4, 5)),  # and 9 evaluations of them the most
        ({}, 8, 0, (4, 40)),
        ({}, 1, 0, (1, 40)),  # or what the run trains on
        ({"eval_steps": 1}, 1100, 0, (1100 // 41, 1)),
        ({"eval_steps": 1}, 44, 0, (4, 1)),  # the user's number of steps stays
        ({"eval_strategy": "no"}, 200, 0, (100, 0.1)),
        ({"load_best_model_at_end": True, "save_steps": 0.1}, 8, 0, (4, 0.1)),
    ],
)
def test_evaluation_budget(tmp_path, flags, train_rows, texts, expected):
    given = {"eval_strategy": "steps", "eval_steps": 0.1, "max_steps": 40, "use_cpu": True, **flags}
    training_args = TrainingArguments(output_dir=str(tmp_path), **given)
    rows = evaluation_rows(PretrainArguments(), training_args, train_rows, 1024, texts)
    assert (rows, training_args.eval_steps) == expected
    assert evaluation_rows(PretrainArguments(max_eval_samples=5), training_args, train_rows, 1024, texts) == 5


# mistakes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"preset": "p2-mhmoe-head5"}, "preset='p2-mhmoe-head5' is not known; the nearest are p2-mhmoe-head"),
        ({"preset": None}, "preset, config_name: neither given"),
        ({"config_name": "config"}, "preset, config_name: both given"),
        ({"preset": None, "config_name": "absent"}, "config_name=absent: "),
        (
            {"preset": None, "config_name": "gpt", "config_overrides": None},
            "config_name=gpt: a gpt2 is not Llama-style",
        ),
        ({"vocab_size": 300}, "tokenizer_name, vocab_size: both given"),
        ({"tokenizer_name": None}, "tokenizer_name, vocab_size: neither given"),
        ({"tokenizer_name": None, "vocab_size": 256}, "vocab_size=256 must be at least 257"),
        ({"tokenizer_name": "train.jsonl"}, "tokenizer_name=train.jsonl: a file, not a model folder"),
        ({"num_train_tokens": None}, "num_train_tokens, max_steps: neither given"),
        ({"max_steps": 3}, "num_train_tokens, max_steps: both given"),
        ({"num_train_tokens": 127}, "num_train_tokens=127 are less than one step of 128 (4 blocks of 32)"),
        ({"document_characters": 0}, "document_characters=0 must be at least 1"),
        ({"max_train_samples": 3}, "max_train_samples=3: give num_train_tokens"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True: another batch size"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy=sequential: the order is fixed"),
        ({"config_overrides": "hidden_size"}, "'hidden_size' is not of the form field=value"),
        ({"config_overrides": "hiden_size=24"}, "hiden_size=24: MHMoEConfig has no such field"),
        ({"config_overrides": "hidden_size=24,num_experts=0"}, "num_experts=0 must be at least 1"),
        ({"config_overrides": "hidden_size=big"}, "hidden_size"),
        ({"config_overrides": "num_experts=many"}, "num_experts"),
        ({"config_overrides": f"{TINY},vocab_size=100"}, "vocab_size=100 is less than the tokenizer's 128"),
        ({"config_overrides": f"{TINY},max_position_embeddings=16"}, "block_size=32 is more than"),
        ({"experts_implementation": "magic"}, "experts_implementation"),
        ({"train_file": "train.jsonl absent.jsonl"}, "absent.jsonl: no such file"),
        ({"validation_file": None, "max_eval_samples": 1000}, "of which 1000 are for validation"),
        ({"block_size": 16000, "num_train_tokens": 64000}, "fills only 0 blocks"),
        ({"train_file": "train.jsonl train.jsonl"}, "train.jsonl: is given twice"),
        ({"output_dir": "tokenizer"}, "output_dir=tokenizer: is not empty"),
        ({"resume_from_checkpoint": "true"}, "resume_from_checkpoint=true: no checkpoint"),
        ({"learning_rat": 1}, "unrecognized arguments: --learning_rat 1; see mhmoe pretrain --help"),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(files, flags, message):
    GPT2Config().save_pretrained("gpt")
    before = sorted(path.name for path in files.iterdir())
    with pytest.raises(UserError) as error:
        run(**flags)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in files.iterdir() if path.name != "cache") == before
