"""The pictures of the speed benchmarks say what their JSON holds."""

import json

import pytest
from benchmark_scripts import BENCHMARKS, load_benchmark


POINT = {"device": "A", "threads": 2, "torch": "2", "part": "block", "size": "head3", "dtype": "fp32", "tokens": 16}


@pytest.fixture(scope="module")
def plots():
    return load_benchmark("plots")


def row(backend, ratio, mode="forward", **point):
    return POINT | {"mode": mode, "backend": backend, "ratio": ratio, "ms": 1, **point}


def test_backends_are_compared_by_their_ratios_to_dense(plots):
    rows = [row("dense", 1), row("subtoken", 2), row("grouped_mm", 5), row("eager", 3), row("batched_mm", 9)]
    rows += [row("subtoken+compile", 4), row("batched_mm+compile", 2), row("subtoken", 2, mode="both")]
    plain, compiled = plots.compare(rows)
    assert (plain["label"], plain["gain"], plain["other"]) == ("MH-MoE head=3", 1.5, "eager")
    assert (compiled["label"], compiled["gain"], compiled["other"]) == ("MH-MoE head=3, compiled", 0.5, "batched_mm")


def test_every_point_is_drawn_with_the_processor(plots):
    rows = [row for row in json.loads((BENCHMARKS / "results" / "experts.json").read_text()) if "ratio" in row]
    ratios, fastest = plots.ratio_figure(rows), plots.fastest_figure(rows)
    points = {tuple(row[key] for key in ("part", "size", "dtype", "tokens", "mode")) for row in rows}
    compiled = sum(row["backend"] == "subtoken+compile" for row in rows)
    assert sum(len(axes.texts) for axes in fastest.axes) == len(points) + compiled
    own = [row for row in rows if (row["part"], row["size"], row["backend"]) == ("block", "head3", "subtoken")]
    drawn = [
        line for axes in ratios.axes for line in axes.lines if line.get_color() == "C0" and line.get_marker() == "o"
    ]
    assert sorted(y for line in drawn for y in line.get_ydata()) == sorted(row["ratio"] for row in own)
    for figure in (ratios, fastest):
        assert "AMD EPYC, 2 threads" in figure.get_suptitle()


def test_each_machine_has_its_own_pictures(plots, tmp_path):
    rows = [row(backend, 2, device=device) for backend in ("subtoken", "eager") for device in ("A", "B-2")]
    for one in rows:
        one |= {"ratio_low": 1.9, "ratio_high": 2.1}
    files = plots.draw_experts([*rows, row("dense", 1) | {"skipped": "why"}], tmp_path)
    assert {file.name for file in files} == {
        f"{name}-{machine}-2-threads-torch-2.png"
        for name in ("experts_ratio", "experts_fastest")
        for machine in ("a", "b-2")
    }
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
