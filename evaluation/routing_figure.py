"""The routing of several models in one picture, as in P1's figures 1a, 5 and 7 (arXiv 2404.15045)."""

from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:  # a --help that names these figures should not wait for it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def save_routing_figure(models: dict[str, dict], file: str | Path) -> None:
    """
    Draw a row of panels for each model: the heatmap layer x expert, the experts activated in each layer, and how many
    tokens reach how many different experts.

    Args:
        models: what `analyse_routing` returned, by the models' names.
        file: the PNG to write, whatever its name ends in.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.1 * len(models)), layout="constrained")
    grid = figure.subplots(len(models), 3, squeeze=False, width_ratios=[4, 1.1, 1.9])
    most = max(len(routing["layers"][0]["tokens_by_experts"]) - 1 for routing in models.values())
    for (heatmap, activated, reach), (name, routing) in zip(grid, models.items(), strict=True):
        _draw_heatmap(figure, heatmap, name, routing)
        _draw_activated(activated, routing)
        _draw_reach(reach, routing, most)
    figure.savefig(file, dpi=150, format="png")


def _draw_heatmap(figure: "Figure", axes: "Axes", name: str, routing: dict) -> None:
    from matplotlib.ticker import MaxNLocator

    layers = routing["layers"]
    heads, top_k, num_experts = (routing[key] for key in ("num_moe_heads", "num_experts_per_tok", "num_experts"))
    image = axes.imshow([layer["frequency"] for layer in layers], aspect="auto", interpolation="nearest", vmin=0)
    name = name if len(name) <= 50 else f"…{name[-49:]}"
    private = "experts" in routing
    own = f"its {num_experts // heads}" if private else num_experts
    axes.set_title(f"{name}\n{heads} head{'s' * (heads > 1)}, top {top_k} of {own} experts", fontsize="medium")
    axes.set_xlabel("expert, head after head" if private else "expert")
    for head in range(1, heads if private else 1):
        axes.axvline(head * num_experts // heads - 0.5, color="white", linewidth=1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16, min_n_ticks=1))
    _label_layers(axes, layers)
    bar = figure.colorbar(image, ax=axes, label=f"selections per token\n(uniform: {heads * top_k / num_experts:.3g})")
    bar.ax.axhline(heads * top_k / num_experts, color="white", linewidth=1.5)


def _draw_activated(axes: "Axes", routing: dict) -> None:
    from matplotlib.ticker import PercentFormatter

    layers = routing["layers"]
    axes.barh(range(len(layers)), [layer["share_activated"] for layer in layers], height=1.0)
    axes.set_title(f"experts activated\n{routing['share_activated']:.1%} in all", fontsize="medium")
    axes.set_xlim(0, 1)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xticks([0, 0.5, 1])
    axes.set_xlabel(f"of a layer's experts,\n{times_chosen(routing)}")
    _label_layers(axes, layers)


def times_chosen(routing: dict) -> str:
    """From when an expert counts as activated."""
    return f"> {routing['threshold']:g} times a token" if routing["threshold"] else "at least once"


def _draw_reach(axes: "Axes", routing: dict, most: int) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    tokens = [sum(column) for column in zip(*(layer["tokens_by_experts"] for layer in routing["layers"]), strict=True)]
    axes.bar(range(1, len(tokens)), [number / sum(tokens) for number in tokens[1:]], width=0.8)
    axes.axvline(routing["experts_per_token"], color="black", linestyle="--", linewidth=1)
    axes.set_title(f"different experts per token\n{routing['experts_per_token']:.2f} on average", fontsize="medium")
    axes.set_xlim(0.4, most + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, min_n_ticks=1))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("different experts")
    axes.set_ylabel("tokens")


def _label_layers(axes: "Axes", layers: list[dict]) -> None:
    step = -(-len(layers) // 10)
    axes.set_yticks(range(0, len(layers), step), [layer["layer"] for layer in layers[::step]])
    axes.set_ylabel("layer")
