"""The measurement that chooses between ways to the same product."""

import json

import pytest
import torch
from expert_modules import inputs, make
from torch.utils.flop_counter import FlopCounterMode

from mhmoe.backends.activations import ModuleActivation, named
from mhmoe.backends.cpu import choices, native, processor
from mhmoe.backends.cpu.tuning import LOADS, SMALL_MATRIX, TILES
from mhmoe.backends.problem import Problem


OTHERS = {
    dtype: choices.Found(tuple(ways[-1] for ways in possible), (False, True, False, True, True, False, False, True))
    for dtype, possible in choices.POSSIBLE.items()
}


def with_load(load: int, dtype: torch.dtype = torch.bfloat16, numbers: int = 1) -> Problem:
    """Two experts of that many rows, whose first matrix has so many numbers."""
    rows = torch.zeros(2 * load, numbers, dtype=dtype)
    weights = torch.zeros(2, 1, numbers, dtype=dtype), torch.zeros(2, numbers, 1, dtype=dtype)
    index = torch.arange(2).repeat(load)[:, None]
    return Problem(rows, *weights, torch.ones(2 * load, 1), index, named("silu", gated=True), dtype)


class TestMeasurement:
    @pytest.fixture(autouse=True)
    def measured(self, monkeypatch, tmp_path):
        """It is on, in a folder of its own, with tiny experts; returns the dtypes that were measured."""
        dtypes, measure = [], choices._measure
        monkeypatch.setenv(choices.VARIABLE, "1")
        monkeypatch.setattr(choices, "_made", {})
        monkeypatch.setattr(choices, "cached_assets_path", lambda **_: tmp_path)
        monkeypatch.setattr(choices, "MEASURED_SIZES", ((48, 40), (32, 32)))
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
        assert kept["faster in C"] == [
            choices.native_pays(with_load(load, dtype, numbers)) for numbers in (SMALL_MATRIX + 1, 1) for load in LOADS
        ]
        assert kept["torch"] == torch.__version__
        assert kept["processor"]
        monkeypatch.setattr(choices, "_made", {})  # another process
        assert [choices.way(dtype, load) for load in LOADS] == ways
        assert measured == [dtype]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_gradients_are_measured_for_themselves(self, dtype, measured, tmp_path, monkeypatch):
        """When they are first asked for; whatever was faster without them."""
        pays = [choices.native_pays(with_load(load, dtype), with_gradients=True) for load in LOADS]
        assert measured == [dtype]
        assert len(list(tmp_path.iterdir())) == 2
        monkeypatch.setattr(choices, "_made", {})
        monkeypatch.setattr(choices, "_compare_with_c", None)
        assert [choices.native_pays(with_load(load, dtype), with_gradients=True) for load in LOADS] == pays

    @pytest.mark.parametrize("with_gradients", [False, True])
    def test_experts_without_gates_are_measured_for_themselves(self, with_gradients, measured, tmp_path, monkeypatch):
        """By the ways of those with gates."""
        problem = with_load(LOADS[1])
        problem.activation = named("gelu", gated=False)
        pays = choices.native_pays(problem, with_gradients)
        assert measured == [torch.bfloat16]
        kept = [json.loads(file.read_text()) for file in tmp_path.iterdir()]
        assert sorted((one["gated"], one["with gradients"]) for one in kept) == [
            (False, with_gradients),
            (True, False),
        ]
        monkeypatch.setattr(choices, "_made", {})
        monkeypatch.setattr(choices, "_compare_with_c", None)
        assert choices.native_pays(problem, with_gradients) == pays

    def test_what_c_cannot_compute_is_not_measured(self, measured):
        problem = with_load(LOADS[1])
        problem.activation = ModuleActivation(torch.nn.Mish())
        assert not choices.native_pays(problem)
        assert not measured

    def test_c_may_be_switched_off_later(self, measured, monkeypatch):
        choices.native_pays(with_load(1))
        monkeypatch.setenv(native.VARIABLE, "0")
        assert not any(choices.native_pays(with_load(load)) for load in LOADS)
        assert len(measured) == (2 if torch.bfloat16 in native._dtypes() else 1)

    def test_the_first_process_decides(self, tmp_path, monkeypatch):
        def late(dtype):
            """While this process measures, another one is ready."""
            file = tmp_path / "now.json"
            file.write_text(json.dumps({"ways": OTHERS[dtype].ways, "faster in C": OTHERS[dtype].native}))
            for name in names:
                file.rename(name)
            return choices.Found(choices.DEFAULTS[dtype], choices.NEVER)

        choices.way(torch.bfloat16, 1)
        names = list(tmp_path.iterdir())
        names[0].unlink()
        monkeypatch.setattr(choices, "_made", {})
        monkeypatch.setattr(choices, "_measure", late)
        assert tuple(choices.way(torch.bfloat16, load) for load in LOADS) == OTHERS[torch.bfloat16].ways
        large = [choices.native_pays(with_load(load, numbers=SMALL_MATRIX + 1)) for load in LOADS]
        small = [choices.native_pays(with_load(load)) for load in LOADS]
        assert (*large, *small) == OTHERS[torch.bfloat16].native

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "[]",
            '{"ways": ["rows"], "faster in C": [false]}',
            '{"ways": [1, 2, 3, 4], "faster in C": [false, false, false, false, false, false, false, false]}',
            '{"ways": ["vectors", "rows", "rows", "rows"], "faster in C": [1, 2, 3, 4, 5, 6, 7, 8]}',
        ],
    )
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
        with FlopCounterMode(display=False) as counter, torch.no_grad():
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


@pytest.mark.parametrize(
    ("instructions", "limits", "dtype", "expected"),
    [
        ("AVX512 AMX", {}, torch.bfloat16, 2 * 8 * 12 // TILES),
        ("AVX512 AMX", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, torch.bfloat16, 2 * 8 * 12 // TILES),
        ("AVX512 AMX", {"ONEDNN_MAX_CPU_ISA": "avx512_core_bf16"}, torch.bfloat16, 2 * 8 * 12),
        ("AVX512 AMX", {"DNNL_MAX_CPU_ISA": "AVX2"}, torch.bfloat16, 2 * 8 * 12),
        ("AVX512 AMX", {}, torch.float32, 2 * 8 * 12),
        ("AVX512 BF16", {}, torch.bfloat16, 2 * 8 * 12),
    ],
)
def test_with_amx_a_row_in_bfloat16_costs_less(monkeypatch, instructions, limits, dtype, expected):
    monkeypatch.setattr(processor, "instructions", lambda: instructions)
    monkeypatch.setattr(processor, "variables", lambda: limits)
    multiplies_tiles = processor.multiplies_tiles.__wrapped__  # what was found for this processor stays
    monkeypatch.setattr(choices, "multiplies_tiles", multiplies_tiles)
    weights = torch.zeros(3, 16, 12, dtype=dtype), torch.zeros(3, 12, 8, dtype=dtype)
    index = torch.zeros(1, 1, dtype=torch.int64)
    problem = Problem(
        torch.zeros(1, 12, dtype=dtype),
        *weights,
        torch.ones(1, 1, dtype=dtype),
        index,
        named("silu", gated=True),
        dtype,
    )
    assert choices.row_cost(problem) == expected


def test_several_threads_are_measured_for_themselves(monkeypatch):
    """Some ways share out experts among threads, others the numbers of each product."""
    monkeypatch.setenv(choices.VARIABLE, "1")
    found = {1: choices.Found(choices.DEFAULTS[torch.float32], choices.NEVER), 3: OTHERS[torch.float32]}
    in_c = torch.float32 in native.dtypes()
    made = {choices.Key(torch.float32, threads, False, True, in_c): one for threads, one in found.items()}
    monkeypatch.setattr(choices, "_made", made)
    threads = torch.get_num_threads()
    try:
        for number, one in found.items():
            torch.set_num_threads(number)
            assert tuple(choices.way(torch.float32, load) for load in LOADS) == one.ways
    finally:
        torch.set_num_threads(threads)


def test_the_nearest_load_counts(monkeypatch):
    monkeypatch.setattr(choices, "_ways", lambda _: ("two columns", "narrow", "at once", "rows"))
    expected = {0.5: "two columns", 1.4: "two columns", 1.5: "narrow", 7.9: "narrow", 8.1: "at once", 63: "at once"}
    expected |= {65: "rows", 10_000: "rows"}
    assert {load: choices.way(torch.float32, load) for load in expected} == expected


def test_examples_are_experts_in_use():
    """Each is measured with as many rows as it says, or where these are many, on average."""
    weights = torch.ones(8, 8, 4), torch.ones(8, 4, 4)
    few, many = (choices._example(weights, 6, rows) for rows in (1, 30))
    assert (few.activation.name, few.activation.gated) == ("silu", True)
    assert len(few.first_proj) == len(few.down_proj) == 6
    assert torch.bincount(few.top_k_index.flatten()).tolist() == [1] * 6
    assert many.top_k_index.shape == (6 * 30, 1)
    assert 1 < torch.bincount(many.top_k_index.flatten()).float().std() < 15
