"""Figures of the routing in Markdown tables, alike for `mhmoe eval` and `mhmoe routing`."""

# heading: the entry of a summary, or of one of its layers, and its format
FIGURES = {
    "experts activated": ("share_activated", ".2%"),
    "experts per token": ("experts_per_token", ".2f"),
    "max / mean load": ("max_over_mean_load", ".2f"),
    "entropy": ("entropy", ".4f"),
}


def figures(routing: dict) -> list[str]:
    """A cell for each of `FIGURES`."""
    return [format(routing[entry], style) for entry, style in FIGURES.values()]


def table(headers: list[str], rows: list[list]) -> str:
    """The first column to the left, the others to the right."""
    from pytablewriter import MarkdownTableWriter
    from pytablewriter.style import Style

    # as strings, or the writer would drop zeros at the end and commas
    styles = [Style(align="left"), *[Style(align="right")] * (len(headers) - 1)]
    hints = ["str"] * len(headers)
    return MarkdownTableWriter(headers=headers, value_matrix=rows, type_hints=hints, column_styles=styles).dumps()
