"""Layer x expert heatmaps, as in P1's figure 5 (arXiv 2404.15045)."""

from pathlib import Path


def save_heatmap(routing: dict, title: str, file: str | Path) -> None:
    """
    Draw each expert's share of its layer's choices.

    Args:
        routing: an [`ExpertCounts.summary`], as it stands in a results file under `routing` for each task.
        title: first line above the picture; the second has the figures over all layers.
        file: the PNG to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers = routing["layers"]
    num_experts = len(layers[0]["load"])
    figure = Figure(
        figsize=(min(max(6.5, 0.13 * num_experts), 24), min(max(2.6, 1.4 + 0.18 * len(layers)), 14)),
        layout="constrained",
    )
    axes = figure.subplots()
    image = axes.imshow([layer["load"] for layer in layers], aspect="auto", interpolation="nearest", vmin=0)
    axes.set_title(
        f"{title}\n{routing['num_sub_tokens']:,} sub-tokens, {routing['share_activated']:.1%} of experts activated, "
        f"entropy {routing['entropy']:.3f}",
        fontsize="medium",
    )
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16, min_n_ticks=1))
    step = -(-len(layers) // 32)
    axes.set_yticks(range(0, len(layers), step), [layer["layer"] for layer in layers[::step]], fontsize="small")
    figure.colorbar(image, ax=axes, label=f"share of the layer's choices\n(uniform: {1 / num_experts:.3g})")
    figure.savefig(file, dpi=150)
