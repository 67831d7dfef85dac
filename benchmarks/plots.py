"""
The speed benchmarks as pictures, each of which answers one question:

    experts_ratio.png    how much slower than a dense FFN of equal FLOPs is each backend?   (experts.json)
    experts_fastest.png  which backend is the fastest, at which size?                       (experts.json)
    throughput.png       how many tokens a second does a whole model take?                  (throughput.json)

    python benchmarks/plots.py                      # from benchmarks/results, into it
    python benchmarks/plots.py --results FOLDER

`experts.py` and `throughput.py` draw them too. Results of several machines give a picture for each.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D


RESULTS = Path(__file__).parent / "results"
COMPILED = "+compile"
SIZES = {
    "small": "MH-MoE head=3, d=168",
    "smoe": "SMoE",
    "fine": "fine-grained SMoE",
    "head2": "MH-MoE head=2",
    "head3": "MH-MoE head=3",
    "1b": "layer of a 1B",
    "7b": "layer of a 7B",
    "vit": "layer of ViT-base's twin",
}
DTYPES = ("fp32", "bf16")
MODES = {"forward": "forward", "both": "forward and backward"}
COLOURS = {"subtoken": "C0", "grouped_mm": "C1", "eager": "C2", "batched_mm": "C3"}
TOP = 32  # ratios above are not drawn: only the copies of batched_mm reach them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    options = parser.parse_args()
    for name, draw in (("experts", draw_experts), ("throughput", draw_throughput)):
        file = options.results / f"{name}.json"
        if file.is_file():
            print(*draw(json.loads(file.read_text()), options.results), sep="\n")


def draw_experts(rows: list[dict], folder: Path) -> list[Path]:
    """Both pictures of `experts.py`'s rows; the files that were written."""
    rows = [row for row in rows if "skipped" not in row]
    return _for_each_machine(rows, folder, {"experts_ratio": ratio_figure, "experts_fastest": fastest_figure})


def draw_throughput(rows: list[dict], folder: Path) -> list[Path]:
    """The picture of `throughput.py`'s rows."""
    rows = [row for row in rows if "skipped" not in row]
    return _for_each_machine(rows, folder, {"throughput": throughput_figure})


def _for_each_machine(
    rows: list[dict], folder: Path, figures: dict[str, Callable[[list[dict]], Figure | None]]
) -> list[Path]:
    machines = list(dict.fromkeys(map(machine, rows)))
    files = []
    for own in machines:
        ending = "" if len(machines) == 1 else "-" + re.sub(r"\W+", "-", own.lower())
        for name, draw in figures.items():
            if figure := draw([row for row in rows if machine(row) == own]):
                figure.savefig(file := folder / f"{name}{ending}.png", dpi=150)
                files.append(file)
    return files


def machine(row: dict) -> str:
    return f"{row['device']}, {row['threads']} thread{'s' * (row['threads'] > 1)}, torch {row['torch']}"


def ratio_figure(rows: list[dict], size: str = "head3") -> Figure | None:
    """A panel for each dtype and mode, a line for each backend, of one layer that is not compiled."""
    own = [row for row in rows if row["part"] == "block" and row["size"] == size and row["backend"] in COLOURS]
    if not own:
        return None
    dtypes, modes = _among(DTYPES, own, "dtype"), _among(MODES, own, "mode")
    figure = Figure(figsize=(4.9 * len(modes), 3.5 * len(dtypes) + 0.9), layout="constrained")
    figure.suptitle(
        f"How much slower than a dense FFN of equal FLOPs is each backend?\nPaper 2's {SIZES[size]} layer. "
        f"{machine(own[0])}. Medians; bars: 80% of the runs.",
        fontsize="medium",
    )
    grid = figure.subplots(len(dtypes), len(modes), squeeze=False, sharex=True, sharey=True)
    for dtype, line_of_axes in zip(dtypes, grid, strict=True):
        for mode, axes in zip(modes, line_of_axes, strict=True):
            _draw_ratios(axes, [row for row in own if (row["dtype"], row["mode"]) == (dtype, mode)])
            axes.set_title(f"{dtype}, {MODES[mode]}", fontsize="medium")
        line_of_axes[0].set_ylabel("time / time of dense")
    for axes in grid[-1]:
        axes.set_xlabel("tokens")
    names = _among(COLOURS, own, "backend")
    handles = [Line2D([], [], color=COLOURS[name], marker="o", label=name) for name in names]
    handles.append(Line2D([], [], color="black", linewidth=1, linestyle="--", label="dense FFN"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _draw_ratios(axes: Axes, rows: list[dict]) -> None:
    ticks = sorted({row["tokens"] for row in rows})
    for name, colour in COLOURS.items():
        line = sorted((row for row in rows if row["backend"] == name), key=lambda row: row["tokens"])
        shown = [row for row in line if row["ratio"] <= TOP]
        axes.errorbar(
            [row["tokens"] for row in shown],
            [row["ratio"] for row in shown],
            [
                [row["ratio"] - row[end] if low else row[end] - row["ratio"] for row in shown]
                for end, low in (("ratio_low", True), ("ratio_high", False))
            ],
            color=colour,
            marker="o",
            markersize=4,
            capsize=2,
        )
        for row in line[:1] and [row for row in line if row["ratio"] > TOP][:1]:
            axes.annotate(
                f"↑ {name}: {row['ratio']:.0f} and more",
                (row["tokens"], TOP),
                color=colour,
                fontsize="small",
                ha="left",
                va="top",
            )
    axes.axhline(1, color="black", linewidth=1, linestyle="--")
    axes.set(xscale="log", yscale="log", ylim=(0.8, TOP))
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize="small", rotation=30)
    axes.set_xticks([], minor=True)
    heights = [1, 1.5, 2, 3, 5, 10, 20]
    axes.set_yticks(heights, [f"{height:g}" for height in heights])
    axes.set_yticks([], minor=True)
    axes.grid(alpha=0.3)


def fastest_figure(rows: list[dict]) -> Figure | None:
    """A panel for each dtype and mode, with a cell for each layer or model and number of tokens."""
    points = compare(rows)
    if not points:
        return None
    labels = list(dict.fromkeys(point["label"] for point in points))
    tokens = sorted({point["tokens"] for point in points})
    dtypes, modes = _among(DTYPES, points, "dtype"), _among(MODES, points, "mode")
    figure = Figure(
        figsize=(2.2 + 0.72 * len(tokens) * len(modes), 1.7 + 0.36 * len(labels) * len(dtypes)), layout="constrained"
    )
    behind = sum(1 / point["gain"] > 1.05 for point in points)
    ahead = sum(point["gain"] >= 1 for point in points)
    figure.suptitle(
        "Which backend is the fastest, at which size?\n"
        f"Time of the best other backend over subtoken's. Blue: subtoken is ahead ({ahead} of {len(points)} points; "
        f"it is behind by more than 5% at {behind}).\nThe other is grouped_mm, or with e: eager, with b: batched_mm. "
        f"{machine(rows[0])}.",
        fontsize="medium",
    )
    grid = figure.subplots(len(dtypes), len(modes), squeeze=False, sharex=True, sharey=True)
    for dtype, line_of_axes in zip(dtypes, grid, strict=True):
        for mode, axes in zip(modes, line_of_axes, strict=True):
            own = [point for point in points if (point["dtype"], point["mode"]) == (dtype, mode)]
            gains = [[float("nan")] * len(tokens) for _ in labels]
            for point in own:
                row, column = labels.index(point["label"]), tokens.index(point["tokens"])
                gains[row][column] = point["gain"]
                letter = "" if point["other"] == "grouped_mm" else f" {point['other'][0]}"
                dark = abs(point["gain"] - 1) > 0.8
                axes.text(
                    column,
                    row,
                    f"{point['gain']:.2f}{letter}",
                    ha="center",
                    va="center",
                    fontsize="small",
                    color="white" if dark else "black",
                )
            axes.imshow(gains, cmap="RdBu", norm=LogNorm(1 / 3, 3), aspect="auto")
            axes.set_title(f"{dtype}, {MODES[mode]}", fontsize="medium")
            axes.set_yticks(range(len(labels)), labels, fontsize="small")
            axes.set_xticks(range(len(tokens)), [f"{number:,}" for number in tokens], fontsize="small")
            axes.tick_params(length=0)
            for side in axes.spines.values():
                side.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("tokens")
    return figure


def compare(rows: list[dict]) -> list[dict]:
    """
    Every point that `subtoken` and another backend were measured at, in the order of SIZES: `gain`, the time of the
    best other backend over subtoken's, which of them is `other`, and `label`, what was run. Backends are compared by
    their ratios to the dense runs beside them, since not all of a point's rows come from one run of the benchmark.
    """
    ratios: dict[tuple, dict[str, float]] = {}
    for row in rows:
        compiled = row["backend"].endswith(COMPILED)
        point = (row["part"], compiled, row["size"], row["dtype"], row["mode"], row["tokens"])
        if row["backend"] != "dense":
            ratios.setdefault(point, {})[row["backend"].removesuffix(COMPILED)] = row["ratio"]
    points = []
    for (part, compiled, size, dtype, mode, tokens), own in sorted(
        ratios.items(), key=lambda item: (item[0][:2], list(SIZES).index(item[0][2]))
    ):
        others = {name: ratio for name, ratio in own.items() if name != "subtoken"}
        if "subtoken" not in own or not others:
            continue
        other = min(others, key=lambda name: others[name])
        label = f"{SIZES[size]}{', compiled' * compiled}{', whole model' * (part == 'model')}"
        points.append(
            {
                "label": label,
                "dtype": dtype,
                "mode": mode,
                "tokens": tokens,
                "other": other,
                "gain": others[other] / own["subtoken"],
            }
        )
    return points


def throughput_figure(rows: list[dict]) -> Figure | None:
    """Bars for each model and dtype, side by side for the backends; a panel for generating and one for training."""
    if not rows:
        return None
    tasks = {"generate": "generating", "train": "training"}
    figure = Figure(figsize=(9.5, 3.9), layout="constrained")
    billions = {round(row["parameters"] / 1e9, 2) for row in rows}
    figure.suptitle(
        f"How many tokens a second does a whole model take?\nModels of {min(billions)} billion parameters and equal "
        f"FLOPs. {machine(rows[0])}.",
        fontsize="medium",
    )
    names = {"mhmoe": "MH-MoE head=3", "mixtral": "Mixtral"}
    backends = _among(COLOURS, rows, "backend")
    for axes, (task, title) in zip(figure.subplots(1, 2), tasks.items(), strict=True):
        own = [row for row in rows if row["task"] == task]
        groups = list(dict.fromkeys((row["model"], row["dtype"]) for row in own))
        for number, backend in enumerate(backends):
            speeds = {
                (row["model"], row["dtype"]): row["tokens_per_second"] for row in own if row["backend"] == backend
            }
            places = [place + (number - (len(backends) - 1) / 2) * 0.4 for place in range(len(groups))]
            bars = axes.bar(
                places, [speeds.get(group, 0) for group in groups], 0.38, color=COLOURS[backend], label=backend
            )
            axes.bar_label(bars, fmt="{:.0f}", fontsize="small")
        axes.set_xticks(range(len(groups)), [f"{names[model]}\n{dtype}" for model, dtype in groups], fontsize="small")
        axes.set_title(title, fontsize="medium")
        axes.margins(y=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("tokens a second")
    figure.axes[0].legend(loc="upper left", fontsize="small")
    return figure


def _among(known: Iterable[str], rows: list[dict], key: str) -> list[str]:
    """Of what is `known`, what occurs in the rows."""
    there = {row[key] for row in rows}
    return [value for value in known if value in there]


if __name__ == "__main__":
    main()
