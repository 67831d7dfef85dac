"""The experts of a few rows without gradients, eager and compiled: against "eager" experts in float64."""

import threading

import pytest
import torch
from expert_modules import (
    EXPERTS,
    TOLERANCE,
    WIDTH,
    InterleavedExperts,
    TransposedExperts,
    TwoMatrixExperts,
    inputs,
    make,
)
from torch import nn

from mhmoe.backends.activations import named
from mhmoe.backends.cpu import choices, few_rows
from mhmoe.backends.cpu import experts as cpu
from mhmoe.backends.problem import Problem
from mhmoe.modeling_mhmoe.experts import MHMoEExperts


KINDS = [MHMoEExperts, TwoMatrixExperts, TransposedExperts, InterleavedExperts]


@pytest.fixture
def calls(monkeypatch):
    """Rows of every call of `few_rows.forward`; no other thread has been there."""
    calls, forward = [], few_rows.forward
    monkeypatch.setattr(few_rows, "_visitors", set())

    def spy(problem, ids):
        calls.append(len(problem.hidden_states))
        return forward(problem, ids)

    monkeypatch.setattr(few_rows, "forward", spy)
    return calls


@pytest.fixture
def vectors(monkeypatch):
    """As where a processor multiplies single rows the fastest in bfloat16."""
    ways = {torch.bfloat16: ("vectors", "vectors", *choices.DEFAULTS[torch.bfloat16][2:])}
    monkeypatch.setattr(choices, "_ways", (choices.DEFAULTS | ways).__getitem__)


@pytest.fixture(params=["eager", "compiled"])
def mode(request):
    return request.param


def exact(experts_class, hidden_states, index, weights) -> torch.Tensor:
    experts = make(experts_class, torch.float64, "eager")
    return experts(hidden_states.double(), index, weights.double()).detach()


@torch.no_grad()
def run(mode, experts: nn.Module, *args) -> torch.Tensor:
    torch._dynamo.reset()  # whose graphs of other tests count towards a limit
    return (torch.compile(experts, fullgraph=True, backend="aot_eager") if mode == "compiled" else experts)(*args)


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE[actual.dtype], f"{error:.1e}"


@pytest.mark.parametrize("experts_class", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [1, 2])
def test_as_the_reference(rows, dtype, experts_class, mode, calls):
    arguments = inputs(rows, dtype)
    output = run(mode, make(experts_class, dtype), *arguments)
    assert output.dtype == dtype
    assert_near(output, exact(experts_class, *arguments))
    if rows == 1:
        assert calls == ([1] if mode == "eager" else [])


@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 5), (torch.bfloat16, 12)], ids=str)
def test_rows_are_few_where_each_expert_has_few(dtype, most, calls):
    """One expert for each row: 5 rows are one for each expert, 12 are 2.4, and six of one expert are many."""
    for count in (most, most + 1):
        hidden_states, _, _ = inputs(count, dtype)
        index = torch.arange(count)[:, None] % EXPERTS
        run("eager", make(dtype=dtype), hidden_states, index, torch.ones(count, 1, dtype=dtype))
    assert calls == [most]
    hidden_states, _, _ = inputs(6, dtype)
    run("eager", make(dtype=dtype), hidden_states, torch.full((6, 1), 2), torch.ones(6, 1, dtype=dtype))
    assert calls == [most]


@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize("experts_class", KINDS, ids=lambda kind: kind.__name__)
def test_an_expert_of_many_rows_among_others(experts_class, mode, calls):
    """It multiplies them together, whatever the order that they come in."""
    hidden_states, _, weights = inputs(4, torch.bfloat16)
    index = torch.tensor([[3, 2], [2, 0], [1, 2], [2, 4]])
    output = run(mode, make(experts_class, torch.bfloat16), hidden_states, index, weights)
    assert_near(output, exact(experts_class, hidden_states, index, weights))
    assert calls == ([4] if mode == "eager" else [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_of_another_process(dtype, mode, calls):
    hidden_states, _, weights = inputs(2, dtype)
    experts = make(dtype=dtype)
    experts._is_expert_parallel = True
    # what was in the memory before must not come out
    with torch.no_grad():
        experts.gate_up_proj[0] = torch.inf
    output = run(mode, experts, hidden_states, torch.tensor([[1, EXPERTS], [EXPERTS, 4]]), weights)
    index = torch.tensor([[1, 1], [4, 4]])
    expected = exact(MHMoEExperts, hidden_states, index, weights * torch.tensor([[1, 0], [0, 1]]))
    assert_near(output, expected)
    many = torch.tensor([[EXPERTS, 1], [EXPERTS, EXPERTS]])
    expected = exact(MHMoEExperts, hidden_states, torch.ones_like(many), weights * torch.tensor([[0, 1], [0, 0]]))
    assert_near(run(mode, experts, hidden_states, many, weights), expected)
    nowhere = run(mode, experts, hidden_states, torch.full((2, 2), EXPERTS + 3), weights)
    assert not nowhere.any()


def test_no_rows(mode):
    output = run(mode, make(), torch.empty(0, WIDTH), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2))
    assert output.shape == (0, WIDTH)


def test_autocast(mode, calls):
    arguments = inputs(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = run(mode, make(), *arguments)
    low = tuple(tensor.bfloat16() if tensor.is_floating_point() else tensor for tensor in arguments)
    assert output.dtype == torch.float32
    assert torch.equal(output.bfloat16(), run(mode, make(dtype=torch.bfloat16), *low))


class TestSwitchOfOneDNN:
    """Off for products of single rows in bfloat16 where that was found to be faster, and at no other time."""

    @pytest.fixture(autouse=True)
    def measured(self, monkeypatch):
        ways = {torch.bfloat16: (choices.WITHOUT_ONE_DNN, *choices.DEFAULTS[torch.bfloat16][1:])}
        monkeypatch.setattr(choices, "_ways", (choices.DEFAULTS | ways).__getitem__)

    @pytest.fixture
    def seen(self, monkeypatch):
        """Whether oneDNN was on at each product of a matrix and a vector."""
        seen, product = [], torch.mv

        def mv(*args, **kwargs):
            seen.append(torch.backends.mkldnn.enabled)
            return product(*args, **kwargs)

        monkeypatch.setattr(torch, "mv", mv)
        return seen

    def test_is_off_for_the_products_alone(self, calls, seen):
        run("eager", make(dtype=torch.bfloat16), *inputs(1, torch.bfloat16))
        assert seen == [False] * 4
        assert torch.backends.mkldnn.enabled

    def test_stays_on_where_it_is_as_fast(self, calls, seen, monkeypatch):
        monkeypatch.setattr(choices, "_ways", choices.DEFAULTS.__getitem__)
        run("eager", make(dtype=torch.bfloat16), *inputs(1, torch.bfloat16))
        assert seen == [True] * 4

    def test_stays_on_in_float16(self, calls, seen):
        run("eager", make(dtype=torch.float16), *inputs(1, torch.float16))
        assert seen == [True] * 4

    def test_comes_back_after_an_error(self, calls, monkeypatch):
        def fail(*args, **kwargs):
            raise RuntimeError("in a product")

        monkeypatch.setattr(torch, "mv", fail)
        with pytest.raises(RuntimeError, match="in a product"):
            run("eager", make(dtype=torch.bfloat16), *inputs(1, torch.bfloat16))
        assert torch.backends.mkldnn.enabled

    def test_stays_off_where_it_was(self, calls, seen, monkeypatch):
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
        run("eager", make(dtype=torch.bfloat16), *inputs(1, torch.bfloat16))
        assert seen == [False] * 4
        assert not torch.backends.mkldnn.enabled

    def test_is_not_touched_where_other_threads_multiply_too(self, calls, seen):
        came, end = threading.Event(), threading.Event()

        def visit():
            cpu.experts(visitor)
            came.set()
            end.wait()

        experts = make()
        hidden_states, index, weights = inputs(1)
        parameters = (experts.gate_up_proj.detach(), experts.down_proj.detach())
        visitor = Problem(hidden_states, *parameters, weights, index, named("silu", gated=True), torch.float32)
        thread = threading.Thread(target=visit)
        thread.start()
        came.wait()
        run("eager", make(dtype=torch.bfloat16), *inputs(1, torch.bfloat16))
        assert seen == [True] * 4
        end.set()
        thread.join()
        run("eager", make(dtype=torch.bfloat16), *inputs(1, torch.bfloat16))
        assert seen == [True] * 4 + [False] * 4
