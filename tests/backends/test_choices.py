"""Rows as columns against the float64 reference, and the measurement that chooses between such ways."""

import json

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

from mhmoe.backends.activations import SwiGLU
from mhmoe.backends.cpu import choices, columns, grouped, memory, workers
from mhmoe.backends.cpu import experts as cpu
from mhmoe.backends.cpu.tuning import CHUNK_ROWS, LOADS
from mhmoe.backends.problem import Problem


OTHERS = {dtype: tuple(ways[-1] for ways in possible) for dtype, possible in choices.POSSIBLE.items()}


@pytest.fixture
def calls(monkeypatch):
    """The ways that are not the defaults, in float64 too; and how often all rows were columns."""
    calls, forward = [], columns.forward
    monkeypatch.setattr(choices, "_made", OTHERS | {torch.float64: OTHERS[torch.float32]})
    monkeypatch.setattr(grouped, "most", lambda dtype: 0)
    monkeypatch.setattr(columns, "forward", lambda problem: calls.append(problem) or forward(problem))
    return calls


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch):
    monkeypatch.setattr(workers, "QUICK_MULTIPLY_ADDS", 0)
    monkeypatch.setattr(memory, "LARGE_BYTES", 16)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def compare(experts_class, dtype, hidden_states, index, weights, **fields):
    exact = make(experts_class, torch.float64, "eager", **fields)(hidden_states.double(), index, weights.double())
    actual = make(experts_class, dtype, **fields)(hidden_states, index, weights)
    assert actual.dtype == dtype
    assert_near({"output": actual}, {"output": exact}, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 90, 2 * CHUNK_ROWS + 30])
def test_columns_as_the_reference(rows, dtype, calls, threads):
    compare(make().__class__, dtype, *inputs(rows, dtype))
    assert len(calls) == (rows > 1)


@pytest.mark.parametrize("experts_class", [TwoMatrixExperts, InterleavedExperts, TransposedExperts])
def test_columns_in_other_layouts(experts_class, calls, threads):
    compare(experts_class, torch.float32, *inputs(90))
    assert len(calls) == (experts_class is not TransposedExperts)  # whose matrices lie the other way round


def test_neighbours_with_all_kinds_of_loads(calls, threads):
    """Together, alone, with gaps between them and in pieces."""
    loads = torch.tensor([5, 6, 7, 8, 0, 9, 70, 3, 0, 0, 40, 41, 600, 1])
    index = torch.arange(len(loads)).repeat_interleave(loads)[:, None]
    hidden_states, _, _ = inputs(len(index))
    compare(make().__class__, torch.float32, hidden_states, index, torch.rand(len(index), 1), num_experts=len(loads))
    assert len(calls) == 1


def test_columns_of_experts_of_another_process(calls, threads):
    hidden_states, index, weights = inputs(90)
    experts, here = make(), index != 3
    with torch.no_grad():
        elsewhere = experts(hidden_states, torch.where(here, index, EXPERTS), weights)
        expected = experts(hidden_states, index, weights * here)
        nowhere = experts(hidden_states, torch.full_like(index, EXPERTS), weights)
    assert_near({"output": elsewhere}, {"output": expected}, 1e-5)
    assert not nowhere.any()
    assert len(calls) == 3


def test_columns_under_autocast(calls):
    arguments = inputs(90)
    experts = make()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = experts(*arguments)
    assert len(calls) == 1
    assert calls[0].dtype == torch.bfloat16
    assert_near({"output": output}, {"output": make(implementation="eager")(*arguments)}, TOLERANCE[torch.bfloat16])


def test_gradients_by_the_other_ways(calls, threads):
    for rows in (3, 90):
        assert_near(run(make(), *inputs(rows)), run(make(implementation="eager"), *inputs(rows)), 1e-5)
    assert not calls  # columns are for what needs no gradients


class TestMeasurement:
    @pytest.fixture(autouse=True)
    def measured(self, monkeypatch, tmp_path):
        """It is on, in a folder of its own, with tiny experts; returns the dtypes that were measured."""
        dtypes, measure = [], choices._measure
        monkeypatch.setenv(choices.VARIABLE, "1")
        monkeypatch.setattr(choices, "_made", {})
        monkeypatch.setattr(choices, "cached_assets_path", lambda **_: tmp_path)
        monkeypatch.setattr(choices, "MEASURED_SIZE", (16, 8))
        monkeypatch.setattr(choices, "MEASURED_SECONDS", 1e-4)
        monkeypatch.setattr(choices, "_measure", lambda dtype: dtypes.append(dtype) or measure(dtype))
        return dtypes

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_is_made_once_and_kept(self, dtype, measured, tmp_path, monkeypatch):
        threads, state = torch.get_num_threads(), torch.get_rng_state()
        ways = [choices.way(dtype, load) for load in LOADS]
        assert all(way in possible for way, possible in zip(ways, choices.POSSIBLE[dtype], strict=True))
        assert torch.get_num_threads() == threads
        assert torch.equal(torch.get_rng_state(), state)
        (file,) = tmp_path.iterdir()
        kept = json.loads(file.read_text())
        assert kept["ways"] == ways
        assert kept["torch"] == torch.__version__
        assert kept["processor"]
        monkeypatch.setattr(choices, "_made", {})  # another process
        assert [choices.way(dtype, load) for load in LOADS] == ways
        assert measured == [dtype]

    def test_the_first_process_decides(self, tmp_path, monkeypatch):
        def late(dtype):
            """While this process measures, another one is ready."""
            file = tmp_path / "now.json"
            file.write_text(json.dumps({"ways": OTHERS[dtype]}))
            for name in names:
                file.rename(name)
            return choices.DEFAULTS[dtype]

        choices.way(torch.bfloat16, 1)
        names = list(tmp_path.iterdir())
        names[0].unlink()
        monkeypatch.setattr(choices, "_made", {})
        monkeypatch.setattr(choices, "_measure", late)
        assert tuple(choices.way(torch.bfloat16, load) for load in LOADS) == OTHERS[torch.bfloat16]

    @pytest.mark.parametrize("text", ["", "[]", '{"ways": ["rows"]}', '{"ways": [1, 2, 3, 4]}'])
    def test_a_damaged_file_is_replaced(self, text, measured, tmp_path, monkeypatch):
        choices.way(torch.bfloat16, 1)
        (file,) = tmp_path.iterdir()
        file.write_text(text)
        for _ in range(2):
            monkeypatch.setattr(choices, "_made", {})
            choices.way(torch.bfloat16, 1)
        assert len(measured) == 2
        assert list(tmp_path.iterdir()) == [file]

    def test_works_where_nothing_can_be_kept(self, measured, tmp_path, monkeypatch):
        monkeypatch.setattr(choices, "cached_assets_path", lambda **_: tmp_path / "missing")
        assert choices.way(torch.bfloat16, 1) == choices.way(torch.bfloat16, 1) == "vectors"
        assert len(measured) == 1

    def test_a_variable_limits_instructions(self, measured, monkeypatch):
        """Then the libraries take other kernels, as on another processor."""
        for value in ("AVX2", "AVX512_CORE"):
            monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", value)
            monkeypatch.setattr(choices, "_made", {})
            choices.way(torch.bfloat16, 1)
        assert len(measured) == 2

    def test_off(self, measured, monkeypatch, tmp_path):
        monkeypatch.setenv(choices.VARIABLE, "0")
        assert tuple(choices.way(torch.float32, load) for load in LOADS) == choices.DEFAULTS[torch.float32]
        assert not measured
        assert not list(tmp_path.iterdir())

    def test_is_not_seen_by_what_follows_operators(self, measured):
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
            make()(*inputs(90))
        assert counter.get_total_flops() > 0
        assert not measured


def test_another_way_must_be_clearly_faster(monkeypatch):
    monkeypatch.setattr(choices, "MEASURED_SECONDS", 10)

    def fastest(**seconds):
        return choices._fastest(seconds.__getitem__, tuple(seconds))

    assert fastest(rows=1.0, columns=0.95) == "rows"
    assert fastest(rows=1.0, columns=0.8) == "columns"
    assert fastest(narrow=1.0, rows=0.8, columns=0.7) == "columns"
    assert fastest(rows=11.0, columns=0.1) == "rows"  # too slow to be worth it


def test_the_nearest_load_counts(monkeypatch):
    monkeypatch.setattr(choices, "_made", {torch.float32: ("two columns", "narrow", "columns", "rows")})
    expected = {0.5: "two columns", 1.4: "two columns", 1.5: "narrow", 7.9: "narrow", 8.1: "columns", 63: "columns"}
    expected |= {65: "rows", 10_000: "rows"}
    assert {load: choices.way(torch.float32, load) for load in expected} == expected


def test_examples_are_experts_in_use(monkeypatch):
    """Each is measured with as many rows as it says."""
    seen = []
    monkeypatch.setattr(cpu, "inference", seen.append)
    weights = {"first_proj": torch.ones(6, 8, 4), "down_proj": torch.ones(6, 4, 4)}
    choices._example(weights, 6, 3)()
    (problem,) = seen
    assert isinstance(problem, Problem)
    assert isinstance(problem.activation, SwiGLU)
    assert torch.bincount(problem.top_k_index.flatten()).tolist() == [3] * 6
