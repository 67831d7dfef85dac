"""Rows as columns, of neighbouring experts at once: against the float64 reference, and how experts are divided."""

import pytest
import torch
from expert_modules import (
    EXPERTS,
    TOLERANCE,
    InterleavedExperts,
    TransposedExperts,
    TwoMatrixExperts,
    assert_near,
    inputs,
    make,
    run,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mhmoe.backends.cpu import choices, columns, memory, workers
from mhmoe.backends.cpu.tuning import CHUNK_ROWS, READ_ROWS


@pytest.fixture
def calls(monkeypatch):
    """Columns are the best way in every dtype; the problems that took it, forward, then those backward."""
    calls, forward, backward = ([], []), columns.forward, columns.backward
    ways = dict.fromkeys(TOLERANCE, tuple(ways[-1] for ways in choices.POSSIBLE[torch.bfloat16]))
    monkeypatch.setattr(choices, "_ways", ways.__getitem__)
    monkeypatch.setattr(columns, "forward", lambda problem, *more: calls[0].append(problem) or forward(problem, *more))
    monkeypatch.setattr(
        columns, "backward", lambda problem, *more: calls[1].append(problem) or backward(problem, *more)
    )
    return calls


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch):
    monkeypatch.setattr(workers, "QUICK_MULTIPLY_ADDS", 0)
    monkeypatch.setattr(memory, "LARGE_BYTES", 16)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["together", "alone"])
def call(request, monkeypatch):
    """What a call costs: so much that all experts go together, or nothing."""
    monkeypatch.setattr(columns, "CALL", (1 << 30) * (request.param == "together"))


def compare(experts_class, dtype, hidden_states, index, weights, **fields):
    exact = run(make(experts_class, torch.float64, "eager", **fields), hidden_states.double(), index, weights.double())
    experts = make(experts_class, dtype, **fields)
    actual = run(experts, hidden_states, index, weights)
    assert {value.dtype for value in actual.values()} == {dtype}
    assert_near(actual, exact, TOLERANCE[dtype])
    with torch.no_grad():
        output = experts(hidden_states, index, weights)
    assert_near({"output": output}, {"output": exact["output"]}, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 90, 2 * CHUNK_ROWS + 30])
def test_as_the_reference(rows, dtype, calls, threads, call):
    compare(make().__class__, dtype, *inputs(rows, dtype))
    assert tuple(map(len, calls)) == ((2, 1) if rows > 1 else (0, 0))  # single rows go one by one


@pytest.mark.parametrize("experts_class", [TwoMatrixExperts, InterleavedExperts, TransposedExperts])
def test_in_other_layouts(experts_class, calls, threads, call):
    compare(experts_class, torch.float32, *inputs(90))
    usual = experts_class is not TransposedExperts  # whose matrices lie the other way round
    assert tuple(map(len, calls)) == (2 * usual, usual)


def test_all_kinds_of_loads(calls, threads, call):
    """Together, alone, with gaps between them and in pieces."""
    loads = torch.tensor([5, 6, 7, 8, 0, 9, 70, 3, 0, 0, 40, 41, 600, 1])
    index = torch.arange(len(loads)).repeat_interleave(loads)[:, None]
    hidden_states, _, _ = inputs(len(index))
    compare(make().__class__, torch.float32, hidden_states, index, torch.rand(len(index), 1), num_experts=len(loads))
    assert tuple(map(len, calls)) == (2, 1)


@pytest.mark.parametrize("missing", [1, EXPERTS])
def test_experts_of_another_process(missing, calls, threads):
    """Their ids are too large, and they add nothing."""
    hidden_states, index, weights = inputs(90)
    experts, here = make(), index < EXPERTS - missing
    expected = run(experts, hidden_states, index, weights * here)
    expected["weights"] *= here
    actual = run(experts, hidden_states, torch.where(here, index, EXPERTS), weights)
    assert_near({name: value + 1 for name, value in actual.items()}, {n: v + 1 for n, v in expected.items()}, 1e-5)
    assert tuple(map(len, calls)) == (2, 2)


def test_no_rows(calls):
    hidden_states, index, weights = inputs(3)
    assert make()(hidden_states[:0], index[:0], weights[:0]).shape == (0, hidden_states.shape[1])


@pytest.mark.parametrize("weights", [torch.float32, torch.float64], ids=str)
def test_under_autocast(weights, calls):
    """The products are in its dtype, the gradients in those of what they are of."""
    arguments = inputs(90, weights)
    expected = run(make(dtype=weights, implementation="eager"), *arguments)
    with torch.autocast("cpu"):
        actual = run(make(dtype=weights), *arguments)
    assert [problem.dtype for problem in (*calls[0], *calls[1])] == [torch.bfloat16] * 2
    assert {value.dtype for value in actual.values()} == {weights}
    assert_near(actual, expected, TOLERANCE[torch.bfloat16])


def test_frozen_tensors(calls):
    """What needs no gradient gets none, and the others are the same."""
    experts, arguments = make(), inputs(90)
    expected = run(experts, *arguments)
    for frozen in ("gate_up_proj", "down_proj"):
        experts.requires_grad_(True).get_parameter(frozen).requires_grad_(False)
        for name, value in run(experts, *arguments).items():
            assert value is None if name == frozen else torch.equal(value, expected[name]), name
    assert len(calls[1]) == 3


def test_spare_rows_carry_nothing_on(calls, monkeypatch):
    """A token that is not finite reaches its own experts alone, though experts are filled up."""
    monkeypatch.setattr(columns, "CALL", 1 << 30)
    hidden_states = torch.ones(6, 12)
    hidden_states[0] = torch.inf
    experts, index = make(), torch.tensor([[0], [2], [2], [2], [3], [3]])
    results = run(experts, hidden_states, index, torch.ones(6, 1))
    assert calls[1]
    assert results["output"][1:].isfinite().all()
    for name in ("gate_up_proj", "down_proj"):
        assert not results[name][0].isfinite().all()
        assert results[name][1:].isfinite().all()


@given(
    st.lists(st.integers(0, 40).map(lambda load: 8 * load), max_size=40),
    st.integers(0, 10_000),
    st.integers(8, 2000),
)
def test_how_experts_are_divided(steps, call, most_rows):
    cost, batches = columns._neighbours(steps, 0, len(steps), call, most_rows)
    covered = [expert for first, count in batches for expert in range(first, first + count)]
    assert covered == sorted(set(covered))
    assert set(covered) >= {expert for expert, load in enumerate(steps) if load}
    sizes = [(count, count * max(steps[first : first + count])) for first, count in batches]
    assert all(count == 1 or rows <= most_rows for count, rows in sizes)
    assert cost == sum(call + rows + READ_ROWS * count for count, rows in sizes)
    assert cost <= sum(call + load + READ_ROWS for load in steps if load)  # one by one


def test_spare_rows_are_not_counted(calls):
    with FlopCounterMode(display=False) as counter:
        run(make(), *inputs(90))
    rows = 90 * make().config.num_experts_per_tok
    first, down = 2 * 8 * 12, 8 * 12  # numbers of an expert's matrices
    assert counter.get_total_flops() == 3 * 2 * rows * (first + down)
    assert not any(calls)


def test_where_the_processor_is_faster_otherwise(calls, monkeypatch):
    monkeypatch.setattr(choices, "_ways", choices.DEFAULTS.__getitem__)
    monkeypatch.setattr(choices, "SMALL_MATRIX", 0)
    run(make(), *inputs(90))
    assert not any(calls)
