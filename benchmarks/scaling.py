"""
How does the loss of P2's five models (arXiv 2411.16205) fall with tokens and FLOPs, and does their order change?

    benchmarks/pretraining.sh pretraining_1m OUTPUT/1m --num_train_tokens 1280000 ...  # and 3m, 5m, 10m
    python benchmarks/scaling.py benchmarks/results/pretraining_{1m,3m,5m,10m}.json

Each file is a comparison of runs whose schedule ended at its number of tokens. For all models together, fits

    loss = E + A * tokens ** -a

with one exponent a, and E and A for each model, by least squares. Prints a table, with the tokens after which each
model would be below SMoE; the same without one of the budgets shows how far that can be trusted. Writes scaling.json
and scaling.png beside the files.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.optimize import minimize_scalar


REFERENCE = "p2-smoe"
FLOPS = 6  # of a multiply-add of the forward pass, with those of the backward pass
Points = dict[str, dict[int, float]]  # of each model: the loss after so many tokens
Fit = tuple[float, dict[str, tuple[float, float]]]  # the exponent, and E and A of each model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparisons", nargs="+", type=Path)
    options = parser.parse_args()
    points, multiply_adds = read(options.comparisons)
    budgets = budgets_of(points)
    if len(budgets) < 3:
        parser.error(f"a fit needs three numbers of tokens at least, not {len(budgets)}")
    whole = fit(points)
    parts = [fit(without(points, budget)) for budget in budgets] if len(budgets) > 3 else []
    results = {"points": points, "exponent": whole[0], "fits": whole[1], "crossings": crossings(whole, parts)}
    folder = options.comparisons[0].parent
    (folder / "scaling.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(points, whole, multiply_adds).savefig(folder / "scaling.png", dpi=120)
    print(table(results))


def read(files: list[Path]) -> tuple[Points, int]:
    """Losses, means over seeds, of the models that all files have; and the multiply-adds of their FFNs for a token."""
    points: Points = {}
    multiply_adds = set()
    for file in files:
        comparison = json.loads(file.read_text(encoding="utf-8"))
        arguments = comparison["arguments"]
        last = len(arguments) - arguments[::-1].index("--num_train_tokens")  # options later on the line hold
        for model in comparison["models"]:
            losses = [math.log(perplexity) for perplexity in model["perplexity"].values()]
            points.setdefault(model["model"], {})[int(arguments[last])] = statistics.mean(losses)
            multiply_adds.add(model["ffn_multiply_adds"])
    complete = {name: losses for name, losses in points.items() if len(losses) == len(files)}
    if len(multiply_adds) > 1 or REFERENCE not in complete:
        raise SystemExit(f"models of equal multiply-adds, {REFERENCE} among them, are needed in each of the files")
    return complete, multiply_adds.pop()


def budgets_of(points: Points) -> list[int]:
    return sorted(points[REFERENCE])  # those of all models


def fit(points: Points) -> Fit:
    """The exponent a, and E and A of each model: for a given exponent these are a line's."""

    def lines(exponent: float) -> tuple[float, dict[str, tuple[float, float]]]:
        error, found = 0.0, {}
        for name, losses in points.items():
            powers = np.array([tokens**-exponent for tokens in losses])
            slope, level = np.polyfit(powers, list(losses.values()), 1)
            error += np.square(level + slope * powers - list(losses.values())).sum()
            found[name] = float(level), float(slope)
        return error, found

    exponent = float(minimize_scalar(lambda value: lines(value)[0], bounds=(0.01, 2), method="bounded").x)
    return exponent, lines(exponent)[1]


def without(points: Points, budget: int) -> Points:
    return {
        name: {tokens: loss for tokens, loss in losses.items() if tokens != budget} for name, losses in points.items()
    }


def crossing(fitted: Fit, name: str) -> float | None:
    """Tokens from which on a model is below the reference by its fit; None if it never is, or always was."""
    exponent, lines = fitted
    levels, slopes = zip(lines[name], lines[REFERENCE], strict=True)
    level, slope = levels[0] - levels[1], slopes[0] - slopes[1]
    return (slope / -level) ** (1 / exponent) if level < 0 < slope else None


def crossings(whole: Fit, parts: list[Fit]) -> dict[str, dict]:
    """By the fit to all budgets, and by those without one of them."""
    others = [name for name in whole[1] if name != REFERENCE]
    return {
        name: {"all": crossing(whole, name), "without one": [crossing(part, name) for part in parts]}
        for name in others
    }


def table(results: dict) -> str:
    budgets = budgets_of(results["points"])
    lines = [f"exponent {results['exponent']:.3f}", ""]
    lines.append("| model | " + " | ".join(f"{tokens / 1e6:.1f}M" for tokens in budgets) + " | E | below SMoE from |")
    lines.append("|---|" + "---:|" * (len(budgets) + 2))
    for name, losses in results["points"].items():
        found = results["crossings"].get(name, {"all": None, "without one": []})
        every = [found["all"], *found["without one"]]
        told = [f"{tokens:.1e}" if tokens else "never" for tokens in every]
        cells = [*(f"{losses[tokens]:.4f}" for tokens in budgets), f"{results['fits'][name][0]:.3f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {'' if name == REFERENCE else ', '.join(told)} |")
    return "\n".join(lines)


def draw(points: Points, fitted: Fit, multiply_adds: int) -> Figure:
    """Losses and fits against tokens, and against the FFNs' FLOPs, which are equal for all models."""
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    exponent, lines = fitted
    budgets = budgets_of(points)
    grid = np.geomspace(budgets[0], 10 * budgets[-1], 100)
    for number, (name, losses) in enumerate(points.items()):
        level, slope = lines[name]
        axes.plot(list(losses), list(losses.values()), "o", color=f"C{number}", label=name.removeprefix("p2-"))
        axes.plot(grid, level + slope * grid**-exponent, color=f"C{number}", linewidth=1)
    axes.axvspan(budgets[-1], grid[-1], color="0.95", zorder=0)
    axes.annotate("not measured", (budgets[-1], axes.get_ylim()[1]), (4, -12), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", xlabel="training tokens", ylabel="validation loss, nats a token", xlim=(grid[0], grid[-1]))
    flops = FLOPS * multiply_adds
    axes.secondary_xaxis("top", functions=(lambda x: x * flops, lambda x: x / flops)).set_xlabel(
        "training FLOPs of the FFNs"
    )
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    main()
