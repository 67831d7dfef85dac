"""`--streaming`: the rows and their order, memory, and runs that go on where they stopped."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zstandard
from datasets import Dataset, IterableDataset, concatenate_datasets
from paths import SUPPORT
from tiny import tiny_model, tiny_tokenizer
from training_runs import documents, logs_of, options, weights_of, write_jsonl

from mhmoe.errors import UserError
from mhmoe.training import TextStream, load_file, pack, pretrain_command, streaming, train_command
from mhmoe.training.data import load_hub_split, stream_files


SIZE = 16  # tokens of a row


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch) -> Path:
    """The working directory of a user, with three files of text, which is tokenised in small chunks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(streaming, "CHARACTERS", 100)
    tiny_model().save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    write_jsonl(Path("train.jsonl"), documents(12))
    Path("more.jsonl.zst").write_bytes(
        zstandard.compress(write_jsonl(Path("more.jsonl"), documents(5, 9)).read_bytes())
    )
    Path("validation.txt").write_text(documents(1, words=300)[0])
    return tmp_path


def make_stream(*texts: list[str], **settings) -> TextStream:
    return TextStream([stream_files(text) for text in texts], tiny_tokenizer(), SIZE, **settings)


def first(stream: TextStream, number: int) -> list[list[int]]:
    return [row["input_ids"] for row in itertools.islice(stream, number)]


def packed(*files: str) -> list[list[int]]:
    return pack(concatenate_datasets([load_file(file) for file in files]), tiny_tokenizer(), SIZE)["input_ids"][:]


# the rows


@pytest.mark.parametrize("workers", [0, 3])
def test_a_pass_has_each_packed_row_once(workers):
    names = ["train.jsonl", "more.jsonl.zst", "validation.txt"]
    rows = packed(*names)
    assert len(rows) > 100
    assert first(make_stream(names, buffer_size=1, workers=workers), 2 * len(rows)) == 2 * rows
    shuffled = first(make_stream(names, buffer_size=10, workers=workers), 2 * len(rows))
    for number in range(0, len(rows) - 10, 10):
        window = shuffled[number : number + 10]
        assert sorted(window) == sorted(rows[number : number + 10])
        assert window != rows[number : number + 10]
    assert sorted(shuffled[: len(rows)]) == sorted(shuffled[len(rows) :]) == sorted(rows)
    assert shuffled[: len(rows)] != shuffled[len(rows) :]
    assert first(make_stream(names, buffer_size=10, seed=1), 10) != shuffled[:10]


def test_texts_take_turns_and_their_first_rows_can_be_left_out():
    train, more = packed("train.jsonl"), packed("more.jsonl.zst")
    rows = first(make_stream(["train.jsonl"], ["more.jsonl.zst"], buffer_size=1, held_out=3), 2 * len(more))
    assert rows[::2] == train[3 : 3 + len(more)]
    assert rows[1::2] == [*more[3:], *more[3:6]]  # it begins again


@pytest.mark.parametrize("held_out", [0, 2])
@pytest.mark.parametrize("buffer_size", [1, 7, 1000])
@pytest.mark.parametrize("texts", [[["train.jsonl", "more.jsonl.zst"]], [["train.jsonl"], ["more.jsonl"]]])
def test_goes_on_after_any_row(texts, buffer_size, held_out):
    settings = {"buffer_size": buffer_size, "held_out": held_out}
    whole = first(make_stream(*texts, **settings), 400)  # some passes over the shorter
    stream = make_stream(*texts, **settings)
    read = iter(stream)
    for taken in range(1, 390):
        for _ in range(12 if taken == 1 else 1):  # which goes ahead of what is taken
            next(read, None)
        stream.take(taken)
        if taken % 23 and taken > 30:
            continue
        state = json.loads(json.dumps(stream.state_dict()))
        resumed = make_stream(*texts, **settings, workers=2)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert first(resumed, 10) == whole[taken : taken + 10]
        resumed = make_stream(*texts, **settings)
        resumed.load_state_dict(state)
        first(resumed, 9)
        resumed.take(5)
        again = make_stream(*texts, **settings)
        again.load_state_dict(resumed.state_dict())
        assert first(again, 3) == whole[taken + 5 : taken + 8]


def test_no_more_is_read_than_is_needed():
    read = []

    def rows():
        for number in range(10**9):
            read.append(number)
            yield {"text": "a" * 50}

    text = IterableDataset.from_generator(rows)
    first(TextStream([text], tiny_tokenizer(), SIZE, buffer_size=10), 100)
    assert len(read) < 100 * SIZE / 50 + 10
    assert len(first(TextStream([text], tiny_tokenizer(), SIZE, buffer_size=10, workers=2), 100)) == 100
    assert len(read) < 2 * (100 * SIZE / 50 + 10)


def test_a_long_text_file_comes_in_pieces(monkeypatch):
    text = "\n".join(documents(30)) + "\n\n" + "x" * 500
    Path("long.txt").write_text(text)
    monkeypatch.setattr("mhmoe.training.data.PIECE", 300)
    pieces = [row["text"] for row in stream_files(["long.txt"])]
    assert "".join(pieces) == text
    assert len(pieces) > 10
    assert all(piece.endswith("\n") for piece in pieces[:-1])


def test_data_sets_of_the_hub_are_streamed():
    Path("data").mkdir()
    for number in range(2):
        rows = Dataset.from_dict({"body": documents(4), "id": [*range(4)]})
        rows.to_parquet(f"data/train-{number}.parquet")
    text = load_hub_split("data", None, "train", "body", streaming=True)
    assert isinstance(text, IterableDataset)
    assert list(text) == [{"text": document} for document in 2 * documents(4)]
    assert load_hub_split("data", None, "test", "body", streaming=True) is None
    with pytest.raises(UserError, match="has no column 'text'"):
        load_hub_split("data", None, "train", streaming=True)
    stream = TextStream([text], tiny_tokenizer(), SIZE, buffer_size=5)
    rows = first(stream, 40)
    stream.take(17)
    again = TextStream([load_hub_split("data", None, "train", "body", streaming=True)], tiny_tokenizer(), SIZE, 5)
    again.load_state_dict(stream.state_dict())
    assert first(again, 20) == rows[17:37]


# the commands

STREAMED = {"train_file": ["train.jsonl", "more.jsonl"], "block_size": SIZE, "shuffle_buffer_size": 30}
TINY = "hidden_size=24,num_hidden_layers=2,num_attention_heads=2"


def train(output: str, *arguments: str, **flags) -> None:
    given = {**STREAMED, "output_dir": output, "max_steps": 6, "per_device_train_batch_size": 4, **flags}
    several = [part for name in ("train_file",) if isinstance(given[name], list) for part in given.pop(name)]
    words = ["--train_file", *several] if several else []
    train_command.main([*options(*arguments, "--streaming", **{"train_file": None} | given), *words])


def pretrain(output: str, *arguments: str, **flags) -> None:
    defaults = {
        "preset": "p2-mhmoe-head2",
        "config_overrides": TINY,
        "tokenizer_name": "model",
        "block_size": SIZE,
        "num_train_tokens": 6 * 4 * SIZE,
        "max_eval_samples": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "shuffle_buffer_size": 10,
        "report_to": "none",
        "output_dir": output,
    }
    given = {name: value for name, value in {**defaults, **flags}.items() if value is not None}
    words = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    files = [] if "train_file" in given else ["--train_file", "train.jsonl", "more.jsonl"]
    pretrain_command.main([*words, *files, "--streaming", "--disable_tqdm", "true", "--use_cpu", *arguments])


def cut_short(folder: str, step: int) -> None:
    """As a run that was killed after that step's checkpoint."""
    for path in Path(folder).iterdir():
        if path.name != f"checkpoint-{step}":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def assert_equal(folder: str, expected: str) -> None:
    weights = weights_of(folder)
    for name, weight in weights_of(expected).items():
        assert torch.equal(weight, weights[name]), name
    timed = ("time", "second", "flos")
    logs, expected_logs = (
        [{key: value for key, value in entry.items() if not any(word in key for word in timed)} for entry in history]
        for history in (logs_of(folder), logs_of(expected))
    )
    assert [entry for entry in logs if "loss" in entry] == [entry for entry in expected_logs if "loss" in entry]
    if any("eval_loss" in entry for entry in logs):  # also where it resumed
        last, expected_last = ([entry for entry in of if "eval_loss" in entry][-1] for of in (logs, expected_logs))
        assert last == expected_last


@pytest.mark.parametrize(
    "flags", [{}, {"gradient_accumulation_steps": 2, "dataloader_num_workers": 2, "data_seed": 5}]
)
def test_a_killed_run_ends_where_an_undisturbed_one_does(flags):
    model = tiny_model(attention_dropout=0.2)  # so random numbers matter too
    model.save_pretrained("model")
    train("undisturbed", save_steps=2, **flags)
    shutil.copytree("undisturbed", "killed")
    cut_short("killed", 2)
    train("killed", save_steps=2, resume_from_checkpoint="true", **flags)
    assert_equal("killed", "undisturbed")
    train("other", **flags, shuffle_buffer_size=29)
    assert any(
        not torch.equal(weight, weights_of("other")[name]) for name, weight in weights_of("undisturbed").items()
    )


def test_the_rows_of_a_run_are_the_stream_s(monkeypatch):
    seen = []
    step = train_command.train.__globals__["MHMoETrainer"].training_step

    def watched(self, model, inputs, *args, **kwargs):
        seen.extend(inputs["input_ids"].tolist())
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr("mhmoe.training.trainer.MHMoETrainer.training_step", watched)
    train("output", gradient_accumulation_steps=2, seed=3)
    expected = make_stream(["train.jsonl", "more.jsonl"], buffer_size=30, seed=3)
    assert seen == first(expected, 6 * 8)
    card = Path("output/README.md")
    assert not card.exists() or "train.jsonl" in card.read_text()


@pytest.mark.parametrize("flags", [{}, {"validation_file": "validation.txt"}])
def test_a_killed_pretraining_ends_where_an_undisturbed_one_does(flags):
    pretrain("undisturbed", **flags)
    pretrain("killed", **flags, save_total_limit=9)
    cut_short("killed", 4)
    pretrain("killed", "--resume_from_checkpoint", "true", **flags, save_total_limit=9)
    assert_equal("killed", "undisturbed")
    report = json.loads(Path("killed/pretraining.json").read_text())
    assert report["finished"]
    assert set(report["texts"]) == ({"train", "more"} if not flags else set())


def test_a_tokenizer_is_trained_on_streamed_text():
    pretrain("output", tokenizer_name=None, vocab_size=300)
    assert json.loads(Path("output/config.json").read_text())["vocab_size"] <= 300


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        (train, {"max_steps": None}, "max_steps: not given, and --streaming does not know where the text ends"),
        (train, {"max_train_samples": 3}, "max_train_samples=3: not with --streaming"),
        (train, {"shuffle_buffer_size": 0}, "shuffle_buffer_size=0 must be at least 1"),
        (train, {"train_file": "absent.jsonl"}, "absent.jsonl: no such file"),
        (train, {"train_file": "model/config.json"}, "has no column 'text'"),
        (train, {"train_file": "broken.jsonl"}, "broken.jsonl: cannot be read as json (line 1"),
        (train, {"train_file": "late.jsonl"}, "late.jsonl: cannot be read as json (line 13"),
        (train, {"train_file": "short.txt"}, "block_size=16: the text to train on does not fill one block"),
        (pretrain, {"train_file": "validation.txt", "document_characters": 9}, "document_characters=9: not with"),
        (pretrain, {"train_file": "short.txt"}, "the text to train on does not fill one block beside those for valid"),
    ],
)
def test_mistakes_get_one_line(command, flags, message):
    Path("broken.jsonl").write_text("{")
    Path("late.jsonl").write_text(Path("train.jsonl").read_text() + "\n{")
    Path("short.txt").write_text("short")
    with pytest.raises(UserError) as error:
        command("output", **{"max_steps": 200 if command is train else None} | flags)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path("output").exists() or "late" in message


def test_a_run_is_resumed_as_it_was_begun():
    train("output", max_steps=2, save_steps=2)
    for flags, message in (
        ({"shuffle_buffer_size": 5}, "shuffle_buffer_size=5: the run to be resumed has shuffle_buffer_size=30"),
        ({"block_size": 32}, "block_size=32: the run to be resumed has block_size=16"),
    ):
        with pytest.raises(UserError, match=message):
            train("output", resume_from_checkpoint="true", **flags)
    with pytest.raises(UserError, match="checkpoint-2: was saved with --streaming; resume it so"):
        train_command.main(options(resume_from_checkpoint="true", block_size=SIZE))
    train_command.main(options(output_dir="other", max_steps=2, save_steps=2, block_size=SIZE))
    with pytest.raises(UserError, match="checkpoint-2: was saved without --streaming; resume it so"):
        train("other", resume_from_checkpoint="true")
    with pytest.raises(UserError, match="shuffle_buffer_size=5: is for --streaming"):
        train_command.main(options(shuffle_buffer_size=5))


@pytest.mark.parametrize("broken", [{}, {"positions": [{"nosuch": 1}]}, {"positions": [1]}, [1], None])
def test_a_checkpoint_that_does_not_say_where_the_text_goes_on(broken):
    train("output", max_steps=2, save_steps=2)
    file = Path("output/checkpoint-2/trainer_state.json")
    state = json.loads(file.read_text())
    kept = state["stateful_callbacks"]["TextStream"]
    kept["attributes"] = {**kept["attributes"], **broken} if broken and isinstance(broken, dict) else broken
    file.write_text(json.dumps(state))
    with pytest.raises(UserError, match="does not say where the text goes on") as error:
        train("output", resume_from_checkpoint="true")
    assert "\n" not in str(error.value)


def test_two_processes_end_where_one_does(tmp_path):
    """Begun on one and resumed on two, and the other way round; with a layout that shares out the model too."""
    train("one", save_steps=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run(
        [*command, str(SUPPORT / "streamed_runs.py")],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )
    for layout in ("copies", "fsdp", "tensor", "each-reads"):
        shutil.copytree(layout, f"one-after-{layout}")
        cut_short(f"one-after-{layout}", 2)
        train(f"one-after-{layout}", save_steps=2, resume_from_checkpoint="true")
        for run in (layout, f"{layout}-after-one", f"one-after-{layout}"):
            weights = weights_of(run)
            for name, weight in weights_of("one").items():
                assert (weight - weights[name]).abs().max() < 5e-5, (run, name)
