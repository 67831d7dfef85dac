"""The simulated traffic against closed forms, and against a count pair by pair."""

import numpy as np
import pytest
from benchmark_scripts import load_benchmark


@pytest.fixture(scope="module")
def simulation():
    return load_benchmark("traffic")


def by_way(rows: list[dict]) -> dict[str, dict]:
    return {row["way"]: row for row in rows}


@pytest.mark.parametrize("processes", [8, 32])
def test_without_skew_the_traffic_is_the_formula_s(simulation, processes):
    chosen, experts = simulation.random_routing(tokens=4096, heads=8, experts=64, top_k=3)
    found = by_way(simulation.traffic(chosen, experts, processes, hidden_size=512))
    there_and_back = 2 * 512 * 2
    remote = 1 - 1 / processes
    assert found["EP"]["bytes_per_token"] == pytest.approx(3 * there_and_back * remote, rel=0.01)
    # with e experts on a process, how many processes three of 64 reach
    each = 64 // processes
    missed = np.prod([(64 - each - drawn) / (64 - drawn) for drawn in range(3)])
    assert found["EP, once"]["bytes_per_token"] == pytest.approx(
        processes * (1 - missed) * there_and_back * remote, rel=0.01
    )
    assert found["HP"]["bytes_per_token"] == pytest.approx(there_and_back * 7 / 8)  # groups of 8
    assert found["HP"]["max_over_mean"] == 1
    assert 1 < found["EP"]["max_over_mean"] < 1.1


def test_pair_by_pair(simulation):
    generator = np.random.default_rng(1)
    chosen = generator.integers(0, 12, (2, 40, 4, 2)) ** 2 // 12  # skewed, and some pairs are the same expert twice
    found = by_way(simulation.traffic(chosen, 12, 4, hidden_size=64))
    sent = {"EP": 0, "EP, once": 0}
    worst = dict.fromkeys(sent, 0.0)
    for layer in chosen:
        received = {way: [0] * 4 for way in sent}
        for token, heads in enumerate(layer):
            home = token // 10
            for experts in heads:
                owners = [expert // 3 for expert in experts]
                for way, targets in (("EP", owners), ("EP, once", set(owners))):
                    for target in targets:
                        received[way][target] += 1
                        sent[way] += target != home
        for way, counts in received.items():
            worst[way] = max(worst[way], max(counts) / (sum(counts) / 4))
    for way, pairs in sent.items():
        assert found[way]["bytes_per_token"] == pytest.approx(pairs * 2 * (64 // 4) * 2 / 80)
        assert found[way]["max_over_mean"] == pytest.approx(worst[way])
    assert found["HP"]["bytes_per_token"] == 2 * 64 * 2 * 3 / 4


def test_table_and_figure_have_every_row(simulation):
    chosen, experts = simulation.random_routing(512, 8, 64, 2)
    rows = [
        {"routing": "random", "processes": processes, **row}
        for processes in simulation.PROCESSES
        for row in simulation.traffic(chosen, experts, processes, 4096)
    ]
    assert simulation.table(rows).count("| random |") == 3
    lines = simulation.figure(rows).axes[0].lines
    assert sorted(y for line in lines for y in line.get_ydata()) == sorted(
        row["bytes_per_token"] / 1024 for row in rows
    )
