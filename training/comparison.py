"""What a set of pre-training runs comes to: a table as P2's table 1, curves as P1's figure 4."""

from pathlib import Path
from statistics import fmean, stdev

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, StrMethodFormatter

from mhmoe.model_cards.markdown import one_line


def summarise(reports: list[dict]) -> list[dict]:
    """
    A row for each model, in the order of `reports`.

    Args:
        reports: what `pretraining.json` holds of each finished run.

    Returns:
        For every model its costs, `tokens_per_second` (mean), `perplexity` of every seed at the end of training, their
        `mean` and their standard deviation `spread` (None of one seed), and `difference`: the same two of its
        perplexity minus that of the first model, seed by seed, as far as both have been run.
    """
    if not reports:
        return []
    final = {(report["model"], report["seed"]): report["curve"][-1]["perplexity"] for report in reports}
    models = list(dict.fromkeys(report["model"] for report in reports))
    summary = []
    for model in models:
        runs = [report for report in reports if report["model"] == model]
        seeds = [run["seed"] for run in runs]
        speeds = [run["tokens_per_second"] for run in runs if run["tokens_per_second"]]
        differences = [final[model, seed] - final[models[0], seed] for seed in seeds if (models[0], seed) in final]
        summary.append(
            {
                "model": model,
                **{key: runs[0][key] for key in ("parameters", "ffn_parameters", "ffn_multiply_adds")},
                "tokens_per_second": fmean(speeds) if speeds else None,
                "perplexity": {str(seed): final[model, seed] for seed in seeds},
                **_mean_and_spread([final[model, seed] for seed in seeds]),
                "difference": _mean_and_spread(differences) if differences else None,
            }
        )
    return summary


def table(summary: list[dict]) -> str:
    """The summary as Markdown."""
    if not summary:
        return "No run has finished.\n"
    first = summary[0]["model"]
    lines = [
        "| model | parameters | FFN parameters | FFN multiply-adds a token | tokens/s | validation perplexity "
        f"| seeds | against {in_table(first)} |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in summary:
        speed = "" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:,.0f}"
        against = "" if row["model"] == first or row["difference"] is None else _plus_minus(row["difference"], "+")
        lines.append(
            f"| {in_table(row['model'])} | {row['parameters']:,} | {row['ffn_parameters']:,} "
            f"| {row['ffn_multiply_adds']:,} "
            f"| {speed} | {_plus_minus(row)} | {len(row['perplexity'])} | {against} |"
        )
    return "\n".join(lines) + "\n"


def table_by_text(reports: list[dict]) -> str:
    """Mean perplexity of each model on each text to validate on, as Markdown."""
    texts = list(dict.fromkeys(name for report in reports for name in report["texts"]))
    lines = [f"| model | {' | '.join(map(in_table, texts))} |", "|---|" + "---:|" * len(texts)]
    for model in dict.fromkeys(report["model"] for report in reports):
        runs = [report["texts"] for report in reports if report["model"] == model]
        lines.append(
            f"| {in_table(model)} | {' | '.join(f'{fmean(run[text] for run in runs):.2f}' for text in texts)} |"
        )
    return "\n".join(lines) + "\n"


def in_table(name: str) -> str:
    """A name that does not end its cell."""
    return one_line(name).replace("|", r"\|")


def draw(reports: list[dict], file: Path) -> None:
    """Validation perplexity against training tokens: the seeds' mean, and a band from the least to the most."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for model in dict.fromkeys(report["model"] for report in reports):
        curves: dict[int, list[float]] = {}
        for report in reports:
            if report["model"] == model:
                for point in report["curve"]:
                    curves.setdefault(point["tokens"], []).append(point["perplexity"])
        tokens = sorted(curves.keys() - {0})  # before training all are at the size of the vocabulary
        (line,) = axes.plot(tokens, [fmean(curves[point]) for point in tokens], marker=".", label=model)
        axes.fill_between(
            tokens,
            [min(curves[point]) for point in tokens],
            [max(curves[point]) for point in tokens],
            alpha=0.2,
            color=line.get_color(),
            linewidth=0,
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("training tokens")
    axes.set_ylabel("validation perplexity")
    axes.grid(alpha=0.3, which="both")
    if reports:
        axes.legend()
    figure.savefig(file, dpi=150, format="png")


def _mean_and_spread(values: list[float]) -> dict[str, float | None]:
    return {"mean": fmean(values), "spread": stdev(values) if len(values) > 1 else None}


def _plus_minus(figures: dict, sign: str = "") -> str:
    spread = "" if figures["spread"] is None else f" ± {figures['spread']:.2f}"
    return f"{figures['mean']:{sign}.2f}{spread}"
