"""`mhmoe train` and what it is made of."""

import gzip
import json
import math
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import evaluate
import pytest
import torch
import zstandard
from datasets import Dataset
from one_step import random_rows
from tiny import CHECKPOINTING, perplexity_in_blocks, tiny_config, tiny_model, tiny_tokenizer
from training_runs import documents, logs_of, options, weights_of, write_jsonl
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
from transformers import trainer as transformers_trainer

from mhmoe.errors import UserError
from mhmoe.evaluation.routing import RoutingRecorder
from mhmoe.model_cards import sections
from mhmoe.training import (
    METRIC_FOLDER,
    MHMoETrainer,
    PretrainArguments,
    TrainArguments,
    causal_batch,
    load_file,
    load_hub_split,
    pack,
    pretrain_command,
    token_predictions,
    train_command,
)
from mhmoe.training.card import write_trained_card
from mhmoe.training.train_command import main, parse


CARD = "---\nlicense: apache-2.0\n---\n# A model\n\n**Not trained after conversion.** Train it\nfirst.\n\n## Sizes\n"
EOS = 2


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """The working directory of a user: a model with its card and licence, text to train on and text to validate on."""
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    Path("model/README.md").write_text(CARD)
    Path("model/LICENSE").write_text("as you like")
    write_jsonl(Path("train.jsonl"), documents(60))
    Path("validation.txt").write_text(documents(1, words=300)[0])
    return tmp_path


def run(*arguments: str, output_dir: str = "output", **flags) -> list[dict]:
    """`mhmoe train` in this process; Trainer's log."""
    main(options(*arguments, output_dir=output_dir, **flags))
    return logs_of(output_dir)


def plain_perplexity(folder: str, text: str, block_size: int) -> float:
    return perplexity_in_blocks(folder, [*tiny_tokenizer()(text)["input_ids"], EOS], block_size)


# the metric


def test_metric_loads_offline_and_counts():
    metric = evaluate.load(str(METRIC_FOLDER))
    result = metric.compute(
        predictions=[[5, 7, 1], [3]],
        references=[[5, 9, -100], [3]],
        log_likelihoods=[[-0.5, -2.0, -50.0], [-0.5]],
    )
    assert result == {
        "perplexity": pytest.approx(math.e),
        "cross_entropy": pytest.approx(1.0),
        "token_accuracy": pytest.approx(2 / 3),
        "tokens": 3,
    }
    with pytest.raises(ValueError, match="no token to count"):
        metric.compute(predictions=[[1]], references=[[-100]], log_likelihoods=[[0.0]])


def test_token_predictions_are_those_of_the_position_before():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator)
    labels = torch.randint(7, (2, 5), generator=generator)
    labels[1, 3] = -100
    most_likely, log_likelihoods = token_predictions((logits, torch.zeros(2)), labels)
    for row in range(2):
        for position in range(1, 5):
            scores = logits[row, position - 1].log_softmax(-1)
            assert most_likely[row, position - 1] == scores.argmax()
            if labels[row, position] != -100:
                expected = scores[labels[row, position]]
                torch.testing.assert_close(log_likelihoods[row, position - 1], expected)


# the text


def test_documents_are_packed_with_an_end_after_each():
    texts = Dataset.from_dict({"text": ["abcde", "", None, "fg", "hijkl"]})
    blocks = pack(texts, tiny_tokenizer(), block_size=4)
    a_to_l = [ord(letter) for letter in "abcdefghijkl"]
    stream = [*a_to_l[:5], EOS, *a_to_l[5:7], EOS, *a_to_l[7:], EOS]
    assert len(stream) == 15
    assert blocks["input_ids"][:] == [stream[:4], stream[4:8], stream[8:12]]  # the last three are dropped
    assert pack(texts, tiny_tokenizer(), 4, max_blocks=2)["input_ids"][:] == [stream[:4], stream[4:8]]
    assert len(pack(texts, tiny_tokenizer(), block_size=16)) == 0
    batch = causal_batch(list(blocks))
    assert batch["labels"].tolist() == batch["input_ids"].tolist() == blocks["input_ids"][:]


LINE_SEPARATORS = ["one\u2028line", "two\nlines\n\nand \x85 more", "three\u2029"]


def test_json_is_read_row_by_row(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", LINE_SEPARATORS, column="body")
    data = path.read_bytes()
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "rows.jsonl.zst").write_bytes(zstandard.compress(data))
    (tmp_path / "array.json").write_text(json.dumps([{"body": text} for text in LINE_SEPARATORS]))
    for name in ("rows.jsonl", "rows.jsonl.gz", "rows.jsonl.zst", "array.json"):
        rows = load_file(str(tmp_path / name), text_column="body")
        assert rows.column_names == ["text"]
        assert rows["text"][:] == LINE_SEPARATORS


def test_text_file_is_one_document(tmp_path):
    text = "\n\n".join(LINE_SEPARATORS)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(text.encode()))
    for name in ("a.txt", "a.txt.zst"):
        assert load_file(str(tmp_path / name))["text"][:] == [text]


def test_data_set_of_the_hub_is_read_by_split(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", ["a", "b"])
    write_jsonl(folder / "validation.jsonl", ["c"])
    assert load_hub_split(str(folder), None, "train")["text"][:] == ["a", "b"]
    assert load_hub_split(str(folder), None, "validation")["text"][:] == ["c"]
    assert load_hub_split(str(folder), None, "test") is None


# the trainer


@pytest.mark.parametrize("arguments", [{}, {CHECKPOINTING: True}])
def test_logs_hold_what_was_routed(tmp_path, arguments):
    rows = random_rows(*[0] * 4)
    model = tiny_model(num_experts=12)
    training_args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=0.0,
        logging_steps=2,
        train_sampling_strategy="sequential",
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        **arguments,
    )
    trainer = MHMoETrainer(model=model, args=training_args, train_dataset=rows)
    trainer.train()
    (logged,) = (entry for entry in trainer.state.log_history if "loss" in entry)

    aux_losses = []
    with RoutingRecorder(model) as recorder, torch.no_grad():
        counts = recorder.new_counts()
        for row in rows:
            aux_losses.append(model(input_ids=row["input_ids"][None], output_router_logits=True).aux_loss.item())
            counts.add(recorder.chosen)
    assert logged["aux_loss"] == pytest.approx(sum(aux_losses) / 4)
    assert logged["experts_activated"] == pytest.approx((counts.counts > 0).float().mean().item())
    assert logged["max_over_mean_load"] == pytest.approx(
        max(12 * layer.max().item() / layer.sum().item() for layer in counts.counts)
    )


# the command


def test_command(files, capsys):
    logs = run(eval_strategy="steps", eval_steps=2)
    evaluations = [entry for entry in logs if "eval_perplexity" in entry]
    assert [entry["step"] for entry in evaluations] == [0, 2, 4]
    text = Path("validation.txt").read_text()
    before, after = plain_perplexity("model", text, 64), plain_perplexity("output", text, 64)
    assert evaluations[0]["eval_perplexity"] == pytest.approx(before, rel=1e-4)
    assert evaluations[-1]["eval_perplexity"] == pytest.approx(after, rel=1e-4)
    assert evaluations[-1]["eval_loss"] == pytest.approx(math.log(after), rel=1e-4)  # no load balancing loss in it
    assert after < before / 2
    first, last = evaluations[0]["eval_perplexity"], evaluations[-1]["eval_perplexity"]
    assert f"perplexity {first:.4f} before, {last:.4f} after" in capsys.readouterr().out

    losses = [entry for entry in logs if "loss" in entry]
    assert [entry["step"] for entry in losses] == [2, 4]
    assert all(entry["aux_loss"] > 1 and 0 < entry["experts_activated"] <= 1 for entry in losses)
    saved = {path.name for path in Path("output").iterdir()}
    assert {"model.safetensors", "modeling_mhmoe.py", "configuration_mhmoe.py", "tokenizer.json", "LICENSE"} <= saved
    before, after = (json.loads(Path(folder, "config.json").read_text()) for folder in ("model", "output"))
    assert {name for name in before if before[name] != after[name]} <= {"bos_token_id", "eos_token_id"}
    card = Path("output/README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n---\n# A model\n")
    assert "Not trained" not in card
    assert "## Sizes" in card
    assert f"| perplexity | {first:.3f} | {last:.3f} |" in card


def test_command_with_the_flags_of_trainer(files):
    flags = {
        "bf16": True,
        CHECKPOINTING: True,
        "gradient_accumulation_steps": 2,
        "batch_eval_metrics": True,
    }
    logs = run("--no_output_router_logits", **flags)
    evaluations = [entry["eval_perplexity"] for entry in logs if "eval_perplexity" in entry]
    assert evaluations[1] < evaluations[0] / 2
    losses = [entry for entry in logs if "loss" in entry]
    assert not any("aux_loss" in entry for entry in losses)
    assert all(0 < entry["experts_activated"] <= 1 for entry in losses)


def test_command_without_validation_text(files, capsys):
    logs = run(validation_file=None)
    assert not any("eval_loss" in entry for entry in logs)
    assert "perplexity was not measured" in capsys.readouterr().out


def test_command_trains_dense_models_too(files):
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = LlamaConfig(**{name: getattr(tiny_config(), name) for name in names}, max_position_embeddings=256)
    LlamaForCausalLM(config).save_pretrained("model")
    logs = run()
    evaluations = [entry["eval_perplexity"] for entry in logs if "eval_perplexity" in entry]
    assert evaluations[1] < evaluations[0] / 2
    assert not any("experts_activated" in entry for entry in logs)


def test_resumed_command_ends_where_an_undisturbed_one_does(files):
    logs = run(output_dir="undisturbed")
    run(output_dir="resumed", save_steps=2)
    for file in Path("resumed/checkpoint-4").iterdir():
        file.unlink()
    Path("resumed/checkpoint-4").rmdir()
    resumed_logs = run(output_dir="resumed", resume_from_checkpoint="true")
    for name, weight in weights_of("undisturbed").items():
        assert torch.equal(weight, weights_of("resumed")[name]), name
    first, last = (
        [entry["eval_perplexity"] for entry in history if "eval_perplexity" in entry]
        for history in (logs, resumed_logs)
    )
    assert (first[0], first[-1]) == (last[0], last[-1])


def test_output_is_only_written_over_when_asked(files):
    run(max_steps=2)
    with pytest.raises(UserError, match="output_dir=output: is not empty"):
        run()
    assert Path("output/checkpoint-2").is_dir()
    run("--overwrite")
    assert Path("output/checkpoint-4").is_dir()
    assert not Path("output/checkpoint-2").exists()


def test_push_keeps_the_card(files, monkeypatch):
    pushed = []

    class Hub:
        def create_repo(self, name, **_):
            return type("Url", (), {"repo_id": f"someone/{name}"})

        def upload_folder(self, repo_id, folder_path, **_):
            pushed.append((repo_id, {path.name: path.read_bytes() for path in Path(folder_path).glob("*.*")}))

    monkeypatch.setattr(transformers_trainer, "hf_api", Hub)
    run(push_to_hub=True, hub_strategy="end")
    ((repo_id, pushed_files),) = pushed
    assert repo_id == "someone/output"
    assert {"README.md", "config.json", "model.safetensors", "modeling_mhmoe.py", "tokenizer.json"} <= set(
        pushed_files
    )
    assert pushed_files["README.md"].decode().startswith("---\nlicense: apache-2.0\n---\n# A model\n")


def test_two_processes_of_accelerate_train_as_one(files):
    flags = {"optim": "sgd", "learning_rate": 0.1, "save_strategy": "no"}
    logs = run(output_dir="one", **flags)
    # --multi_gpu is accelerate's name for one process per device, also where the devices are CPUs
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    arguments = options(output_dir="two", per_device_train_batch_size=2, **flags)
    subprocess.run(
        [*launch, "--main_process_port=0", "-m", "mhmoe", "train", *arguments],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(files / "cache")},
    )
    expected = weights_of("one")
    for name, weight in weights_of("two").items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6)
    for key in ("eval_perplexity", "eval_tokens", "aux_loss", "experts_activated", "max_over_mean_load"):
        one, two = ([entry[key] for entry in history if key in entry] for history in (logs, logs_of("two")))
        assert two == pytest.approx(one, rel=1e-4), key


# a finished run is not lost


def latin_card() -> None:
    Path("model/README.md").write_bytes("# Mod\u00e8le\n".encode("latin-1"))


def broken_metadata() -> None:
    Path("model/README.md").write_text("---\ntags:\n\t- a\nlicense: apache: 2\n---\n# A model\n")


def licences_in_a_folder() -> None:
    Path("model/LICENSES").mkdir()
    Path("model/LICENSES/MIT.txt").write_text("as you like")
    Path("model/LICENSES/again").symlink_to("..")
    Path("model/NOTICE").symlink_to("nowhere")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (latin_card, "output/README.md: was not written ('utf-8' codec"),
        (broken_metadata, "output/README.md: its metadata, which is that of model/README.md, cannot be read"),
        (licences_in_a_folder, "model/NOTICE: was not copied"),
    ],
)
def test_finished_run_is_saved_whatever_lies_beside_its_source(files, caplog, change, line):
    change()
    run(max_steps=1, save_strategy="no")
    assert weights_of("output")
    assert "tokenizer.json" in {path.name for path in Path("output").iterdir()}
    assert Path("output/LICENSE").read_text() == "as you like"
    (warning,) = (record.getMessage() for record in caplog.records if record.name.startswith("mhmoe"))
    assert warning.startswith(line)
    assert "\n" not in warning
    if change is licences_in_a_folder:
        assert [path.name for path in Path("output/LICENSES").rglob("*")] == ["MIT.txt"]
        assert Path("output/LICENSES/MIT.txt").read_text() == "as you like"


def test_model_that_would_give_tuples_is_trained(files):
    edit_json("config.json", return_dict=False)
    run(max_steps=1)
    assert weights_of("output")


@pytest.mark.parametrize(("metric", "better"), [("perplexity", min), ("eval_token_accuracy", max)])
def test_best_model_is_the_best(files, metric, better):
    flags = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    run(learning_rate=0.3, metric_for_best_model=metric, **flags)
    key = f"eval_{metric.removeprefix('eval_')}"
    *measured, at_the_end = (entry[key] for entry in logs_of("output") if key in entry)
    assert at_the_end == pytest.approx(better(measured[1:]))  # the first was before training


def edit_json(name: str, **fields) -> None:
    file = Path("model", name)
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        # another eos token than the tokenizer's: Trainer changes it, and what was changed is checked on saving
        ("generation_config.json", {"do_sample": False, "temperature": 0.7, "eos_token_id": 5}, "temperature"),
        ("config.json", {"output_attentions": True}, "output_attentions"),
    ],
)
def test_what_could_not_be_saved_is_not_trained(files, name, fields, message):
    edit_json(name, **fields)
    with pytest.raises(UserError, match="could not be saved after training, so it is not trained") as error:
        run()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path("output").exists()


def test_weights_are_there_before_the_last_evaluation(files, monkeypatch):
    evaluate = MHMoETrainer.evaluate

    def fails_in_the_end(self, *args, **kwargs):
        if self.state.global_step:
            raise RuntimeError("out of memory")
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(MHMoETrainer, "evaluate", fails_in_the_end)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(max_steps=1, save_strategy="no")
    assert weights_of("output")


class BrokenHub:
    """A Hub that lets repositories be made, if at all, and nothing be uploaded."""

    def __init__(self, lets_make: bool):
        self.lets_make = lets_make

    def create_repo(self, name, **_):
        if not self.lets_make:
            raise ConnectionError("no\nnetwork")
        return type("Url", (), {"repo_id": f"someone/{name}"})

    def upload_folder(self, **_):
        raise ConnectionError("no\nnetwork")


def test_push_that_fails_leaves_the_model(files, monkeypatch):
    monkeypatch.setattr(transformers_trainer, "hf_api", lambda: BrokenHub(lets_make=True))
    message = r"push_to_hub: failed \(no network\); .*`hf upload someone/output output` tries it again"
    with pytest.raises(UserError, match=message):
        run(push_to_hub=True, hub_strategy="end", max_steps=1, save_strategy="no")
    assert weights_of("output")
    assert "## Training" in Path("output/README.md").read_text()
    assert Path("output/LICENSE").is_file()


def test_repository_that_cannot_be_made_is_found_before_training(files, monkeypatch):
    monkeypatch.setattr(transformers_trainer, "hf_api", lambda: BrokenHub(lets_make=False))
    with pytest.raises(UserError, match=r"push_to_hub: the repository cannot be made \(no network\)"):
        run(push_to_hub=True)
    assert not Path("output").exists()


def test_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(files, caplog):
    run(output_dir="undisturbed")
    run(save_steps=2)
    Path("output/model.safetensors").unlink()
    Path("output/checkpoint-4/trainer_state.json").write_text("")
    with pytest.raises(UserError, match=r"=output/checkpoint-4: no checkpoint of Trainer that is whole \(broken"):
        run(resume_from_checkpoint="output/checkpoint-4")
    run(resume_from_checkpoint="true")
    skipped, chosen = (record.getMessage() for record in caplog.records if record.name.startswith("mhmoe"))
    assert skipped.startswith("output/checkpoint-4: is not whole and skipped (broken trainer_state.json")
    assert chosen == "output/checkpoint-2: the run goes on from here"
    for tensor, weight in weights_of("undisturbed").items():
        assert torch.equal(weight, weights_of("output")[tensor]), tensor


@pytest.mark.parametrize("harm", [os.mkfifo, os.mkdir, lambda file: os.symlink("elsewhere", file)])
def test_broken_checkpoint_that_cannot_be_written_over(files, harm):
    run(save_steps=2)
    Path("output/checkpoint-4/scheduler.pt").unlink()
    harm("output/checkpoint-4/scheduler.pt")
    before = Path("output/checkpoint-4/optimizer.pt").stat().st_mtime_ns
    with pytest.raises(UserError, match=r"checkpoint-4/scheduler.pt: is no file .* can take the place of; remove it"):
        run(resume_from_checkpoint="true")
    assert Path("output/checkpoint-4/optimizer.pt").stat().st_mtime_ns == before


def test_run_without_a_whole_checkpoint(files):
    run(max_steps=1)
    Path("output/checkpoint-1/trainer_state.json").write_text("")
    with pytest.raises(UserError, match="resume_from_checkpoint=true: no checkpoint of Trainer that is whole"):
        run(resume_from_checkpoint="true")


# the card


def test_card_is_found_by_its_marks(tmp_path):
    source, output = tmp_path / "source.md", tmp_path
    source.write_text(f"# A model\n\n{sections.section('status', '**Wholly untrained** so far.')}\n\n## Sizes\n")
    write_trained_card(source, output, ["On books."])
    card = (output / "README.md").read_text()
    assert "untrained" not in card
    assert "Trained after conversion" in sections.find(card, "status")
    assert sections.find(card, "training") == "## Training\n\nOn books."
    assert "## Sizes" in card
    (output / "README.md").rename(source)
    write_trained_card(source, output, ["On other books."])
    assert sections.find((output / "README.md").read_text(), "training").endswith("On books.\n\nOn other books.")


# the command line


def flags_of(parser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")}


@pytest.mark.parametrize("command", [train_command, pretrain_command])
def test_every_flag_has_both_spellings(command):
    flags = flags_of(command.parser())
    assert len(flags) > 200
    for flag in flags:
        assert {flag.replace("-", "_").replace("__", "--", 1), "--" + flag[2:].replace("_", "-")} <= flags


@pytest.mark.parametrize("command", [train_command, pretrain_command])
def test_help_has_our_arguments_first(command):
    printed = command.parser().format_help()
    titles = ["text:", "how the text is read:", "the run:", "options of transformers' Trainer:"]
    positions = [printed.index(f"\n{title}\n") for title in titles]
    assert positions == sorted(positions)
    assert printed.index("--train_file", 200) < printed.index("--learning_rate")
    assert printed.index("--overwrite") < printed.index("--output_dir OUTPUT_DIR")
    assert len(printed[: positions[0]].splitlines()) < 40


def test_arguments_are_composed_of_parts_that_share_no_field():
    for composed in (TrainArguments, PretrainArguments):
        names = [item.name for part in composed.__bases__ for item in fields(part)]
        assert len(names) == len(set(names)) == len(fields(composed))


# mistakes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"train_file": "absent.jsonl"}, "absent.jsonl: no such file"),
        ({"train_file": "empty.jsonl"}, "empty.jsonl: the file is empty"),
        ({"train_file": "blank.txt"}, "does not fill one block"),
        ({"train_file": "broken.jsonl"}, "broken.jsonl: cannot be read as json"),
        ({"train_file": "broken.jsonl.zst"}, "broken.jsonl.zst: cannot be read as json"),
        ({"train_file": "latin.txt"}, "latin.txt: cannot be read as text"),
        ({"train_file": "train.csv"}, "train.csv: cannot tell what it holds"),
        ({"text_column": "body"}, "'body' (text_column); its columns are id, text"),
        ({"text_column": "id"}, "column 'id' (text_column) holds"),
        ({"dataset_name": "some/data"}, "both given"),
        ({"train_file": None}, "neither given"),
        ({"train_file": None, "dataset_name": "no/such-data"}, "dataset_name=no/such-data: cannot be loaded"),
        ({"block_size": 257}, "block_size=257 is more than the model's max_position_embeddings=256"),
        ({"block_size": 1}, "block_size=1 must be at least 2"),
        ({"max_train_samples": 0}, "max_train_samples=0 must be at least 1"),
        ({"train_file": "short.jsonl"}, "the text to train on does not fill one block"),
        ({"validation_file": "short.jsonl"}, "the validation text does not fill one block"),
        ({f"{CHECKPOINTING}_kwargs": '{"use_reentrant": true}'}, "use_reentrant=true would lose the gradient"),
        ({"resume_from_checkpoint": "true"}, "resume_from_checkpoint=true: no checkpoint"),
        ({"resume_from_checkpoint": "model"}, "resume_from_checkpoint=model: no checkpoint"),
        ({"output_dir": "model"}, "output_dir=model: holds the model to train"),
        ({"output_dir": "train.jsonl"}, "output_dir=train.jsonl: a file"),
        ({"learning_rat": 1}, "unrecognized arguments: --learning_rat 1"),
        ({"max_steps": "many"}, "invalid int value: 'many'"),
        ({"lr_scheduler_type": "none"}, "invalid choice: 'none'"),
        ({"eval_strategy": "steps", "validation_file": None}, "eval_strategy=steps: there is no text"),
        ({"train_file": "half.jsonl"}, "half.jsonl: column 'text' (text_column) is no Unicode in line 2"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0 must be at least 1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0 must be at least 1"),
        ({"eval_steps": -1}, "eval_steps=-1 must not be negative"),
        ({"eval_do_concat_batches": "false"}, "eval_do_concat_batches=False"),
        ({"metric_for_best_model": "bleu"}, "metric_for_best_model=bleu: is not measured; choose one of loss"),
        # what Trainer and torch refuse, each at another place
        ({"accelerator_config": "absent.json"}, "absent.json"),
        ({"report_to": "wandb"}, "Trainer cannot be set up so"),
        ({"learning_rate": -1}, "training cannot begin so (Invalid learning rate: -1.0)"),
        ({"lr_scheduler_kwargs": '{"x": 1}'}, "training cannot begin so"),
        ({"dataloader_num_workers": -1}, "training cannot begin so"),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(files, flags, message):
    Path("empty.jsonl").touch()
    Path("blank.txt").write_text("\n")
    Path("broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    Path("broken.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "a"}')[:-3])
    Path("half.jsonl").write_text('{"text": "a"}\n{"text": "\\ud800"}\n')
    Path("latin.txt").write_bytes("d\u00e9j\u00e0 vu".encode("latin-1"))
    Path("train.csv").write_text("text\na\n")
    write_jsonl(Path("short.jsonl"), ["a few letters"])
    with pytest.raises(UserError) as error:
        run(**flags)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path("output").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: Path("model/config.json").unlink(), "model: its config cannot be loaded"),
        (lambda: Path("model/config.json").write_text("{"), "model/config.json: cannot be read as JSON"),
        (lambda: Path("model/model.safetensors").unlink(), "model: cannot be loaded"),
        (lambda: Path("model/model.safetensors").write_bytes(b"\x08" * 100), "model: cannot be loaded"),
        (lambda: Path("model/tokenizer.json").unlink(), "model: its tokenizer cannot be loaded"),
        (lambda: tiny_model(vocab_size=64).save_pretrained("model"), "its tokenizer has 128 tokens, the model only"),
        (
            lambda: edit_json("tokenizer_config.json", model_max_length="long"),
            "model_max_length='long' must be a number",
        ),
        (
            lambda: Path("model/adapter_config.json").write_text("{}"),
            "model/adapter_config.json: an adapter; merge it",
        ),
        (lambda: tiny_model().model.save_pretrained("model"), "model: 1 tensors of the model are not there, lm_head"),
    ],
)
def test_broken_model_gets_one_line(files, change, message):
    change()
    with pytest.raises(UserError) as error:
        run()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path("output").exists()


def test_absent_model_gets_one_line():
    with pytest.raises(UserError, match="no such folder") as error:
        main(["no-such-folder/model", "--train_file", "a.txt"])
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="the following arguments are required: MODEL"):
        parse(["--train_file", "a.txt"])


def test_processes_that_would_each_train_alone_are_refused(files, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"WORLD_SIZE=2 processes were launched|MASTER_ADDR"):  # accelerate's own
        run(use_cpu=False)
