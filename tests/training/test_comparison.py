"""`mhmoe compare`: the table and the curves from given reports, and a set that is cut short, extended and broken."""

import json
import random
import shutil
from pathlib import Path

import pytest
from tiny import tiny_config, tiny_tokenizer

from mhmoe.errors import UserError
from mhmoe.training import compare as comparing
from mhmoe.training import compare_command
from mhmoe.training.comparison import draw, summarise, table, table_by_text


def report(model: str, seed: int, perplexity: float, speed: float | None = 100.0) -> dict:
    return {
        "model": model,
        "seed": seed,
        "parameters": 1234567,
        "ffn_parameters": 1000,
        "ffn_multiply_adds": 500,
        "tokens_per_second": speed,
        "curve": [{"tokens": 0, "perplexity": 99.0}, {"tokens": 640, "perplexity": perplexity}],
    }


def test_table_is_mean_and_spread_over_seeds():
    reports = [
        report("dense", 1, 10.0),
        report("dense", 2, 14.0, speed=200.0),
        report("moe", 1, 9.0, speed=None),
        report("moe", 2, 12.0, speed=None),
        report("moe", 3, 12.0, speed=None),
        report("late", 3, 8.0),
    ]
    dense, moe, late = summarise(reports)
    assert (dense["mean"], dense["spread"], dense["tokens_per_second"]) == (12.0, pytest.approx(8**0.5), 150.0)
    assert moe["perplexity"] == {"1": 9.0, "2": 12.0, "3": 12.0}
    assert (moe["mean"], moe["spread"]) == (11.0, pytest.approx(3**0.5))
    # seeds 1 and 2, which both have: -1 and -2
    assert moe["difference"] == {"mean": -1.5, "spread": pytest.approx(0.5**0.5)}
    assert (late["spread"], late["difference"]) == (None, None)
    lines = table([dense, moe, late]).splitlines()
    assert lines[0].endswith("| against dense |")
    assert lines[2] == "| dense | 1,234,567 | 1,000 | 500 | 150 | 12.00 ± 2.83 | 2 |  |"
    assert lines[3] == "| moe | 1,234,567 | 1,000 | 500 |  | 11.00 ± 1.73 | 3 | -1.50 ± 0.71 |"
    assert lines[4].endswith("| 8.00 | 1 |  |")
    assert summarise([]) == []
    assert "No run" in table([])


def test_table_by_text():
    texts = [{"a": 2.0, "b": 9.0}, {"a": 4.0, "b": 9.5}, {"a": 1.0, "b": 1.0}]
    reports = [report("dense", 1, 10.0), report("dense", 2, 10.0), report("moe", 1, 10.0)]
    lines = table_by_text([{**row, "texts": text} for row, text in zip(reports, texts, strict=True)]).splitlines()
    assert lines == ["| model | a | b |", "|---|---:|---:|", "| dense | 3.00 | 9.25 |", "| moe | 1.00 | 1.00 |"]


def test_curves_are_drawn(tmp_path):
    for number, reports in enumerate(([], [report("dense", 1, 10.0), report("dense", 2, 14.0)])):
        draw(reports, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    tiny_tokenizer().save_pretrained("tokenizer")
    generator = random.Random(0)
    rows = [json.dumps({"text": " ".join(generator.choices(["cat", "sat", "mat", "rain"], k=40))}) for _ in range(40)]
    Path("train.jsonl").write_text("\n".join(rows))
    return tmp_path


def options(*arguments: str, models: str = "p2-dense p2-mhmoe-head2", seeds: str = "1 2", **flags) -> list[str]:
    defaults = {
        "models": models,
        "seeds": seeds,
        "output_dir": "set",
        "config_overrides": "hidden_size=24,num_hidden_layers=2,num_attention_heads=2",
        "tokenizer_name": "tokenizer",
        "train_file": "train.jsonl",
        "max_eval_samples": 4,
        "block_size": 32,
        "num_train_tokens": 256,
        "per_device_train_batch_size": 4,
        "save_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
    }
    given = {name: value for name, value in {**defaults, **flags}.items() if value is not None}
    return [*arguments, *(part for name, value in given.items() for part in (f"--{name}", *str(value).split(" ")))]


def run(*arguments: str, **flags) -> dict:
    compare_command.main(options(*arguments, **flags))
    return json.loads(Path("set/comparison.json").read_text())


def test_set_is_cut_short_and_goes_on(files, monkeypatch, capsys):
    trained, pretrain = [], comparing.pretrain

    def recorded(pretraining, training_args):
        trained.append((Path(training_args.output_dir).name, training_args.resume_from_checkpoint))
        if len(trained) == 3:
            raise KeyboardInterrupt
        return pretrain(pretraining, training_args)

    monkeypatch.setattr(comparing, "pretrain", recorded)
    with pytest.raises(KeyboardInterrupt):
        run(tokenizer_name=None, vocab_size=260)
    assert [name for name, _ in trained] == ["p2-dense-seed1", "p2-mhmoe-head2-seed1", "p2-dense-seed2"]
    assert not list(Path("set").glob("*/checkpoint-*"))
    first = json.loads(Path("set/comparison.json").read_text())

    # as if the second had been cut short after a checkpoint
    monkeypatch.setattr(comparing, "pretrain", pretrain)
    unfinished = Path("set/p2-mhmoe-head2-seed1")
    report = json.loads((unfinished / "pretraining.json").read_text())
    shutil.rmtree(unfinished)
    (unfinished / "checkpoint-9").mkdir(parents=True)  # half written
    (unfinished / "pretraining.json").write_text(json.dumps({**report, "finished": False}))
    trained.clear()
    monkeypatch.setattr(comparing, "pretrain", lambda *a: (trained.append(a[1].output_dir), pretrain(*a)))
    result = run(tokenizer_name=None, vocab_size=260)
    assert [Path(name).name for name in trained] == [
        "p2-mhmoe-head2-seed1",
        "p2-dense-seed2",
        "p2-mhmoe-head2-seed2",
    ]
    assert [(model["model"], list(model["perplexity"])) for model in result["models"]] == [
        ("p2-dense", ["1", "2"]),
        ("p2-mhmoe-head2", ["1", "2"]),
    ]
    for before, after in zip(first["models"], result["models"], strict=True):
        assert before["perplexity"]["1"] == after["perplexity"]["1"]
    assert table(result["models"]) in Path("set/comparison.md").read_text()
    assert table(result["models"]) in capsys.readouterr().out
    assert Path("set/comparison.png").is_file()
    command = "`mhmoe compare --models p2-dense p2-mhmoe-head2 --seeds 1 2 --config_overrides hidden_size=24,"
    assert command in Path("set/comparison.md").read_text()
    assert json.loads(Path("set/p2-dense-seed1/config.json").read_text())["vocab_size"] == 260


def test_run_goes_on_from_its_checkpoint(files, monkeypatch):
    undisturbed = run(models="p2-smoe", seeds="1")["runs"][0]
    shutil.rmtree("set")
    monkeypatch.setattr(
        comparing.shutil, "rmtree", lambda folder: None
    )  # keep the last checkpoint, and the one before
    run("--save_total_limit", "2", models="p2-smoe", seeds="1")
    monkeypatch.undo()
    monkeypatch.chdir(files)
    (report := Path("set/p2-smoe-seed1/pretraining.json")).write_text(
        json.dumps({**json.loads(report.read_text()), "finished": False})
    )
    shutil.rmtree("set/p2-smoe-seed1/checkpoint-2")
    resumed, pretrain = [], comparing.pretrain
    monkeypatch.setattr(comparing, "pretrain", lambda *a: (resumed.append(a[1].resume_from_checkpoint), pretrain(*a)))
    result = run("--save_total_limit", "2", models="p2-smoe", seeds="1")
    assert resumed == ["set/p2-smoe-seed1/checkpoint-1"]
    assert result["runs"][0]["curve"] == undisturbed["curve"]


def test_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(files, monkeypatch):
    monkeypatch.setattr(comparing.shutil, "rmtree", lambda folder: None)  # keep the checkpoints
    undisturbed = run("--save_total_limit", "2", models="p2-smoe", seeds="1")["runs"][0]
    monkeypatch.undo()
    monkeypatch.chdir(files)
    Path("set/p2-smoe-seed1/pretraining.json").write_text('{"finis')  # by a version that did not write it at once
    weights = Path("set/p2-smoe-seed1/checkpoint-2/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    resumed, pretrain = [], comparing.pretrain
    monkeypatch.setattr(comparing, "pretrain", lambda *a: (resumed.append(a[1].resume_from_checkpoint), pretrain(*a)))
    result = run("--save_total_limit", "2", models="p2-smoe", seeds="1")
    assert resumed == ["set/p2-smoe-seed1/checkpoint-1"]
    assert result["runs"][0]["curve"] == undisturbed["curve"]


def test_flags_in_either_spelling_are_the_same_set(files, monkeypatch):
    run(models="p2-dense", seeds="1")
    monkeypatch.setattr(comparing, "pretrain", lambda *_: pytest.fail("trained again"))
    arguments = options(models="p2-dense", seeds="1")
    compare_command.main([part.replace("_", "-") if part.startswith("--") else part for part in arguments])
    with pytest.raises(UserError, match="config_name: not for mhmoe compare"):
        compare_command.main([*arguments, "--config-name=own"])
    with pytest.raises(UserError, match="unrecognized arguments: --learning-rat 1"):
        compare_command.main([*options(output_dir="other"), "--learning-rat", "1"])


def test_settings_that_were_not_written_to_their_end(files):
    Path("set").mkdir()
    Path("set/compare.json").write_text('{"argum')
    with pytest.raises(UserError, match=r"set/compare\.json: cannot be read"):
        run()


def test_models_are_in_the_order_asked_for(files):
    run(models="p2-smoe", seeds="1")
    result = run(models="p2-dense p2-smoe", seeds="2 1")
    assert [model["model"] for model in result["models"]] == ["p2-dense", "p2-smoe"]
    assert all(model["perplexity"].keys() == {"1", "2"} for model in result["models"])


def test_one_failure_leaves_the_others(files, monkeypatch, capsys):
    pretrain = comparing.pretrain

    def fails_for_smoe(pretraining, training_args):
        if pretraining.preset == "p2-smoe":
            raise RuntimeError("out of\nmemory")
        return pretrain(pretraining, training_args)

    monkeypatch.setattr(comparing, "pretrain", fails_for_smoe)
    tiny_config().save_pretrained("own")
    with pytest.raises(UserError, match=r"failed: p2-smoe-seed1 \(RuntimeError: out of memory\); the same command"):
        run(models="p2-smoe p2-dense", seeds="1")
    assert "Failed: p2-smoe-seed1 (RuntimeError: out of memory)." in Path("set/comparison.md").read_text()
    monkeypatch.setattr(comparing, "pretrain", pretrain)
    result = run(models="p2-smoe p2-dense", seeds="1")
    assert [model["model"] for model in result["models"]] == ["p2-smoe", "p2-dense"]
    assert result["failures"] == {}


def test_config_from_a_folder_is_compared_too(files):
    tiny_config(num_experts=4).save_pretrained("own")
    result = run(models="own p2-dense", seeds="1", config_overrides="hidden_size=24,num_attention_heads=2")
    assert [model["model"] for model in result["models"]] == ["own", "p2-dense"]
    assert Path("set/own-seed1/model.safetensors").is_file()


def test_comparison_names_files_without_their_folders(files):
    run(models="p2-dense", seeds="1", train_file=files / "train.jsonl")
    for name in ("comparison.md", "comparison.json"):
        text = Path("set", name).read_text()
        assert "train.jsonl" in text
        assert str(files) not in text


def test_comparison_names_models_and_tokenizers_without_their_folders(files):
    tiny_config(num_experts=4).save_pretrained("own")
    overrides = "hidden_size=24,num_attention_heads=2"
    run(models=files / "own", seeds="1", config_overrides=overrides, tokenizer_name=files / "tokenizer")
    for name in ("comparison.md", "comparison.json", "own-seed1/pretraining.json"):
        assert str(files) not in Path("set", name).read_text(), name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"models": "p2-dense p2-mhmoe"}, "preset='p2-mhmoe' is not known"),
        ({"models": "p2-dense p2-dense"}, "models: p2-dense is given twice"),
        ({"seeds": "1 1"}, "seeds: 1 is given twice"),
        ({"seeds": "one"}, "--seeds"),
        ({"seed": 1}, "seed: not for mhmoe compare"),
        ({"resume-from-checkpoint": "true"}, "resume_from_checkpoint: not for mhmoe compare"),
        ({"preset": "p2-dense"}, "preset: not for mhmoe compare"),
        ({"train_file": "absent.jsonl"}, "absent.jsonl: no such file"),
        ({"num_train_tokens": None}, "num_train_tokens, max_steps: neither given"),
        ({"output_dir": "tokenizer"}, "output_dir=tokenizer: is not empty, and not of mhmoe compare"),
        ({"learning_rat": 1}, "unrecognized arguments: --learning_rat 1; see mhmoe compare --help"),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(files, flags, message):
    before = sorted(path.name for path in files.iterdir())
    with pytest.raises(UserError) as error:
        run(**flags)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in files.iterdir() if path.name != "cache") == before


def test_several_processes_are_refused(files, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE=2: mhmoe compare runs as one process"):
        run()
    assert not Path("set").exists()


def test_set_with_other_options_is_refused(files):
    run(models="p2-dense", seeds="1")
    with pytest.raises(UserError, match="output_dir=set: holds runs with other options"):
        run(models="p2-dense", seeds="1", num_train_tokens=128)


def test_names_stay_in_their_cells():
    summary = summarise([report("a|b\nc", 1, 10.0)])
    assert table(summary).splitlines()[2].startswith(r"| a\|b\\nc | 1,234,567 |")
    rows = table_by_text([{**report("a|b", 1, 10.0), "texts": {"x|y": 1.0}}]).splitlines()
    assert rows[0] == r"| model | x\|y |"
    assert rows[2] == r"| a\|b | 1.00 |"


def test_what_is_published_has_no_paths_and_no_markdown_of_names(files, monkeypatch):
    names = ["a|b", "<!-- `c` -->", "line\nbreak"]
    for name in names:
        tiny_config().save_pretrained(Path("models", name))

    def fail(*_):
        raise OSError(28, "No space left on device", str(files / "set" / "a file.bin"))

    monkeypatch.setattr(comparing, "carry_out", fail)
    arguments = [*options(models=None, seeds=None), "--models", *(f"models/{name}" for name in names)]
    long = json.dumps({"even_batches": True, **dict.fromkeys(map(str, range(100)))})  # no file has such a name
    assert comparing.without_folders(long) == long
    with pytest.raises(UserError, match="and 2 more"):
        compare_command.main(arguments)
    page = Path("set/comparison.md").read_text()
    assert str(files) not in page + Path("set/comparison.json").read_text()
    assert "No space left on device: 'a file.bin'" in page
    assert r"Failed: line\\nbreak-seed0" in page
    assert "\n<!--" not in page
    assert "``mhmoe compare --models 'a|b' '<!-- `c` -->' $'line\\nbreak' --seeds 0 " in page


def test_reasons_without_paths():
    reasons = {
        "[Errno 28] No space: '/root/my folder/a.bin'": "[Errno 28] No space: 'a.bin'",
        "/tmp/x/y.json: broken, see https://example.org/a/b": "y.json: broken, see https://example.org/a/b",
        "a/b and 1 / 2": "a/b and 1 / 2",
    }
    for reason, published in reasons.items():
        assert comparing.without_paths(reason) == published
