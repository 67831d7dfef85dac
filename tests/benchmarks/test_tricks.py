"""What a trick is switched off by is there, and comes back."""

import pytest
from benchmark_scripts import load_benchmark


@pytest.fixture
def tricks():
    return load_benchmark("tricks")


def value_while_off(tricks, module, name, without) -> object:
    seen = []
    tricks.changed(module, name, without, lambda: seen.append(getattr(module, name)))
    (value,) = seen
    return value


def test_every_trick_is_off_for_one_run(tricks):
    for *_, module, name, without in tricks.TRICKS.values():
        before = getattr(module, name)
        assert value_while_off(tricks, module, name, without) == without
        assert getattr(module, name) is before


def test_a_row_of_a_trick(tricks, monkeypatch):
    monkeypatch.setitem(tricks.experts.SIZES, "smoe", ((64, 32), (1, 4, 1, 32)))
    options = tricks.argparse.Namespace(size="smoe", budget=0, clock="cpu")
    row = tricks.measure("measured ways, one token, bf16", options)
    assert row["runs"] >= 3
    assert row["ratio"] > 0
