"""The benchmark of conversions runs from text to table, and goes on where it was."""

import json

import pytest
from benchmark_scripts import load_benchmark


@pytest.fixture
def upcycling(tmp_path, monkeypatch):
    module = load_benchmark("upcycling")
    block, batch = 32, 2
    step = block * batch
    sizes = {"BLOCK": block, "BATCH": batch, "STEP": step, "VOCABULARY": 300, "VALIDATION_CHARACTERS": (4000, 4000)}
    sizes |= {"TOKENS": 4 * step, "TUNING_TOKENS": step, "EVALUATIONS": 2}
    sizes |= {"RESULTS": tmp_path / "upcycling.json", "SETTINGS": {**module.SETTINGS, "bf16": False}}
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes["SIZES"] = {"0.7M": (tiny, 2 * step, 4e-3)}
    sizes["SETTINGS"] |= {"per_device_train_batch_size": batch}
    sizes["RUN"] = {**module.RUN, "block_size": block}
    for name, value in sizes.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_every_start_goes_on_with_equal_tokens_and_equal_flops(upcycling, tmp_path, monkeypatch):
    texts = [tmp_path / name for name in ("books.jsonl", "more.jsonl")]
    for number, file in enumerate(texts):
        words = " ".join(f"word {word * (number + 3) % 97}" for word in range(5000))
        file.write_text(json.dumps({"text": words}) + "\n")
    given = ["upcycling.py", "--train_file", str(texts[0]), "--validation_file", str(texts[1]), "--seeds", "1", "2"]
    monkeypatch.setattr("sys.argv", [*given, "--output_dir", str(tmp_path / "models")])
    upcycling.main()

    rows = upcycling.read(upcycling.RESULTS)
    tuning = [row for row in rows if row["seed"] == upcycling.TUNING_SEED]
    assert {row["tokens"] for row in tuning} == {upcycling.TUNING_TOKENS}
    for start in upcycling.STARTS:
        of_tokens, of_flops = (upcycling.runs_of(rows, start, equal) for equal in ("tokens", "flops"))
        assert of_tokens.keys() == of_flops.keys() == {1, 2}
        assert {row["tokens"] for row in of_tokens.values()} == {upcycling.TOKENS}
        dense = upcycling.runs_of(rows, "dense", "tokens")[1]
        for row in of_flops.values():
            assert row["tokens"] * row["multiply_adds"] <= 1.02 * dense["tokens"] * dense["multiply_adds"]
            assert row["learning_rate"] == upcycling.tuned(rows, start)
        tried = {row["learning_rate"]: row["loss"] for row in tuning if row["start"] == start}
        assert {3e-4, 1e-3} <= tried.keys()
        assert tried[upcycling.tuned(rows, start)] == min(tried.values())
    first = [upcycling.runs_of(rows, start, "tokens")[1]["curve"][0] for start in ("dense", "exact")]
    assert first[0] == first[1]
    assert (tmp_path / "upcycling.png").stat().st_size > 0

    monkeypatch.setattr(upcycling, "train", None)  # a second call trains nothing
    upcycling.main()
    assert upcycling.read(upcycling.RESULTS) == rows


def test_the_table_has_mean_and_deviation_of_paired_differences(upcycling):
    def row(start, seed, loss):
        counted = {"parameters": 1, "multiply_adds": 10, "learning_rate": 1e-3, "curve": [[0, 5.0], [256, loss]]}
        return {"start": start, "seed": seed, "tokens": 256, "loss": loss, **counted}

    losses = {"dense": (3.0, 4.0), "exact": (2.9, 3.7)}
    rows = [row(start, seed, loss) for start, of_start in losses.items() for seed, loss in enumerate(of_start)]
    line = next(line for line in upcycling.table(rows).splitlines() if line.startswith("| exact"))
    assert "| 3.30000 ± 0.56569 | -0.20000 ± 0.14142 | 2 |" in line
