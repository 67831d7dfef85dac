"""All experts at once: when, and what differs from each by itself. test_backends.py compares it with the reference."""

from contextlib import nullcontext

import pytest
import torch
from expert_modules import EXPERTS, TOLERANCE, assert_near, inputs, make, run
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mhmoe.backends.activations import named
from mhmoe.backends.cpu import choices, columns, grouped
from mhmoe.backends.cpu.tuning import READ_ROWS, SMALL, SMALL_16_BIT, SMALL_MATRIX
from mhmoe.backends.problem import Problem


@pytest.fixture
def calls(monkeypatch):
    """How often torch's grouped product was called."""
    for dtype in TOLERANCE:
        grouped._is_known(dtype)  # which tries it
        if dtype != torch.float64:
            grouped._may_begin_anywhere(dtype)
    calls, product = [], grouped.grouped_mm
    monkeypatch.setattr(grouped, "grouped_mm", lambda *args, **kwargs: calls.append(args) or product(*args, **kwargs))
    return calls


@pytest.mark.parametrize("rows", [1, 7, 90, 900])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_small_experts_go_together(dtype, rows, calls):
    """At once in float32, in 16 bits as columns."""
    hidden_states, index, weights = inputs(rows, dtype, width=16)
    experts = make(dtype=dtype, hidden_size=32)
    actual = run(experts, hidden_states, index, weights)
    assert len(calls) == (6 if dtype == torch.float32 else 0)
    exact = make(dtype=torch.float64, implementation="eager", hidden_size=32)
    expected = run(exact, hidden_states.double(), index, weights.double())
    assert_near(actual, expected, TOLERANCE[dtype])
    with torch.no_grad():
        output = experts(hidden_states, index, weights)
    assert_near({"output": output}, {"output": expected["output"]}, TOLERANCE[dtype])
    if dtype == torch.float32:
        assert len(calls) == (6 if rows == 1 else 8)  # single rows are for few_rows.py


def test_where_that_was_measured(calls, monkeypatch):
    """Large experts too, without gradients."""
    monkeypatch.setattr(choices, "SMALL_MATRIX", 0)
    arguments, experts = inputs(90), make()
    expected = run(experts, *arguments)
    monkeypatch.setattr(choices, "_ways", lambda _: ("vectors", "at once", "rows", "rows"))
    with torch.no_grad():
        several, many = (experts(*(tensor[:rows] for tensor in arguments)) for rows in (15, 90))
    assert len(calls) == 2  # of the 15 tokens, for six rows an expert; 36 are many
    assert_near({"output": several}, {"output": expected["output"][:15]}, 1e-5)
    assert_near({"output": many}, {"output": expected["output"]}, 1e-5)
    for rows in (15, 90):
        run(experts, *(tensor[:rows] for tensor in arguments))
    assert len(calls) == 2


def unaligned(weight: torch.Tensor) -> nn.Parameter:
    """As a file mapped into memory may have it."""
    return nn.Parameter(torch.cat([weight.new_zeros(1), weight.detach().flatten()])[1:].view_as(weight))


NOT_AT_ONCE = {
    "float64": ({}, torch.float64, nullcontext),
    "rows of 24 bytes": ({}, torch.bfloat16, nullcontext),
    "rows of 20 bytes": ({"moe_intermediate_size": 5}, torch.float32, nullcontext),
    "operators are followed": ({}, torch.float32, lambda: FlopCounterMode(display=False)),
}


@pytest.mark.parametrize("case", NOT_AT_ONCE)
def test_what_torch_cannot_do_goes_one_by_one(case, calls):
    fields, dtype, context = NOT_AT_ONCE[case]
    arguments = inputs(90, dtype)
    with context():
        actual = run(make(dtype=dtype, **fields), *arguments)
    assert not calls
    assert_near(actual, run(make(dtype=dtype, implementation="eager", **fields), *arguments), TOLERANCE[dtype])


@pytest.mark.parametrize("product", [None, torch.mm])
def test_a_torch_without_the_product(product, monkeypatch):
    arguments = inputs(90)
    expected = run(make(implementation="eager"), *arguments)
    monkeypatch.setattr(grouped, "grouped_mm", product)
    grouped._is_known.cache_clear()
    try:
        assert_near(run(make(), *arguments), expected, TOLERANCE[torch.float32])
        assert not grouped._is_known(torch.float32)
    finally:
        grouped._is_known.cache_clear()


@pytest.mark.parametrize("may", [True, False])
def test_weights_that_begin_anywhere(may, calls, monkeypatch):
    """As those of a loaded model, which must have the same result as the one that was saved."""
    experts, arguments = make(), inputs(90)
    expected = run(experts, *arguments)
    if not may:
        monkeypatch.setattr(grouped, "_may_begin_anywhere", lambda dtype: False)
    calls.clear()
    experts.down_proj = unaligned(experts.down_proj)
    assert experts.down_proj.data_ptr() % 16
    for name, value in run(experts, *arguments).items():
        assert torch.equal(value, expected[name]), name
    assert len([call for call in calls if call[1].data_ptr() % 16 == 0]) == (6 if not may else 4)


def test_no_rows(calls):
    hidden_states, index, weights = inputs(3)
    assert make()(hidden_states[:0], index[:0], weights[:0]).shape == (0, hidden_states.shape[1])
    assert not calls


@pytest.mark.parametrize("missing", [1, EXPERTS])
def test_experts_of_another_process(missing, calls):
    """Their ids are too large, and they add nothing."""
    hidden_states, index, weights = inputs(90)
    experts = make()
    kept = index < EXPERTS - missing
    expected = run(experts, hidden_states, index, weights * kept)
    expected["weights"] *= kept
    calls.clear()
    actual = run(experts, hidden_states, torch.where(kept, index, EXPERTS), weights)
    assert calls
    assert_near({name: value + 1 for name, value in actual.items()}, {n: v + 1 for n, v in expected.items()}, 1e-5)


def test_frozen_weights_need_no_product(calls):
    experts, arguments = make(), inputs(90)
    expected = run(experts, *arguments)
    calls.clear()
    experts.requires_grad_(False)
    actual = run(experts, *arguments)
    assert len(calls) == 4
    assert torch.equal(actual["input"], expected["input"])
    assert actual["down_proj"] is None


def test_threads_add_in_the_same_order(calls):
    """Unlike in transformers' grouped_mm: so a run of training can be repeated."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        experts = make(hidden_size=128, moe_intermediate_size=16)
        arguments = inputs(900, width=64)
        first = run(experts, *arguments)
        for _ in range(5):
            for name, value in run(experts, *arguments).items():
                assert torch.equal(value, first[name]), name
    finally:
        torch.set_num_threads(before)
    assert calls


@pytest.mark.parametrize(
    ("dtype", "most", "way"),
    [(torch.float32, SMALL, grouped), (torch.bfloat16, SMALL_16_BIT, columns), (torch.float16, SMALL_16_BIT, columns)],
)
def test_how_small(dtype, most, way):
    """Rows of an expert, and what it takes to read its matrix, times the size of that; and that size itself."""

    def together(load: int, inner_size: int = 64) -> bool:
        experts = make(dtype=dtype, hidden_size=128, moe_intermediate_size=inner_size)
        index = torch.zeros(EXPERTS * load, 1, dtype=torch.long)
        hidden_states, weights = torch.zeros(len(index), 64), torch.ones(len(index), 1)
        matrices = experts.gate_up_proj, experts.down_proj
        problem = Problem(hidden_states, *matrices, weights, index, named("silu", gated=True), dtype)
        return way.suit(problem, with_gradients=True)

    load = most // (2 * 64 * 64) - READ_ROWS
    assert together(load)
    assert not together(load + 1)
    largest = SMALL_MATRIX // (2 * 64)
    assert together(1, largest)
    assert not together(1, largest + 8)
