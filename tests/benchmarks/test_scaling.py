"""Fits of the loss against tokens."""

import json
import math
import sys

import pytest
from benchmark_scripts import load_benchmark


BUDGETS = 1_280_000, 2_560_000, 5_120_000, 10_240_000
FITS = {"p2-dense": (3.1, 20.0), "p2-smoe": (3.0, 21.0), "p2-mhmoe-head2": (2.95, 24.0)}
EXPONENT = 0.3


@pytest.fixture(scope="module")
def scaling():
    return load_benchmark("scaling")


def write(folder, budget, fits, multiply_adds=1000):
    models = [
        {
            "model": name,
            "ffn_multiply_adds": multiply_adds,
            # two seeds, whose mean is on the line
            "perplexity": {
                seed: math.exp(level + slope * budget**-EXPONENT + shift)
                for seed, shift in (("1", 0.01), ("2", -0.01))
            },
        }
        for name, (level, slope) in fits.items()
    ]
    arguments = ["--num_train_tokens", "100", "--num_train_tokens", str(budget)]
    file = folder / f"pretraining_{budget}.json"
    file.write_text(json.dumps({"arguments": arguments, "models": models}))
    return str(file)


def test_known_fits_are_found_again(scaling, tmp_path, monkeypatch, capsys):
    files = [write(tmp_path, budget, FITS) for budget in BUDGETS]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *files])
    scaling.main()
    results = json.loads((tmp_path / "scaling.json").read_text())
    assert results["exponent"] == pytest.approx(EXPONENT, abs=1e-4)
    for name, line in FITS.items():
        assert results["fits"][name] == pytest.approx(line, rel=1e-3)
    crossing = results["crossings"]["p2-mhmoe-head2"]
    expected = (3.0 / 0.05) ** (1 / EXPONENT)
    assert [crossing["all"], *crossing["without one"]] == pytest.approx([expected] * 5, rel=1e-2)
    assert results["crossings"]["p2-dense"]["all"] is None
    assert (tmp_path / "scaling.png").exists()
    assert "never" in capsys.readouterr().out


def test_models_that_one_file_lacks_are_left_out(scaling, tmp_path):
    files = [write(tmp_path, budget, FITS) for budget in BUDGETS[:2]]
    files.append(write(tmp_path, BUDGETS[2], {name: line for name, line in FITS.items() if name != "p2-dense"}))
    points, multiply_adds = scaling.read([tmp_path / file for file in files])
    assert set(points) == {"p2-smoe", "p2-mhmoe-head2"}
    assert multiply_adds == 1000


def test_models_of_unequal_cost_are_refused(scaling, tmp_path):
    files = [tmp_path / write(tmp_path, budget, FITS, multiply_adds=budget) for budget in BUDGETS]
    with pytest.raises(SystemExit, match="equal multiply-adds"):
        scaling.read(files)


def test_two_budgets_are_too_few(scaling, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling.py", *(write(tmp_path, budget, FITS) for budget in BUDGETS[:2])])
    with pytest.raises(SystemExit):
        scaling.main()
    assert "three numbers of tokens at least, not 2" in capsys.readouterr().err
