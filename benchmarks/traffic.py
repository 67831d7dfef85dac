"""
Bytes that a token sends between processes in one MH-MoE layer's forward: expert parallelism against head parallelism
(arXiv 2602.04870), by simulation. Nothing is sent: it counts, for given choices of experts, what would be.

    python benchmarks/traffic.py                                     # routing drawn at random, without skew
    python benchmarks/traffic.py --models FOLDER ... --text FILE     # and as models route a text

Experts lie on the processes in order, E/N on each. Tokens lie on them in equal parts. Counted is what goes to another
process and comes back, in three ways:

    EP            every pair of a sub-token and an expert, as transformers' expert parallelism sends it
    EP, once      a sub-token once to each process that has experts of it, with its results added up there
    HP            a sub-token to the process of its head, whose experts are all there: in groups of h processes

MH-MoE's heads share their experts. HP has to deal them out, E/h to each head, which is another model; so what its
routing would be is not known, and need not be: its traffic does not depend on it.

Writes traffic.json and traffic.png.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from mhmoe.evaluation.routing import RoutingRecorder
from mhmoe.files import write_json
from mhmoe.loading import load_causal_lm
from mhmoe.training import load_file, pack


RESULTS = Path(__file__).parent / "results"
PROCESSES = (8, 16, 32, 64)
WAYS = ("EP", "EP, once", "HP")
BYTES = 2  # of a number, in bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=[], help="MH-MoE folders whose routing is recorded")
    parser.add_argument("--text", help="what they route: a file as mhmoe train takes it")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=8, help="of the random routing (default: %(default)s)")
    parser.add_argument("--experts", type=int, default=64, help="of the random routing (default: %(default)s)")
    parser.add_argument("--top_k", type=int, default=2, help="of the random routing (default: %(default)s)")
    parser.add_argument(
        "--hidden_size", type=int, default=4096, help="that bytes are given for (default: %(default)s)"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    options = parser.parse_args()
    routings = {"random": random_routing(options.tokens, options.heads, options.experts, options.top_k)}
    for folder in options.models:
        routings[Path(folder).name] = recorded_routing(folder, options.text, options.tokens)
    rows = [
        {"routing": name, "processes": processes, **measured}
        for name, (chosen, experts) in routings.items()
        for processes in PROCESSES
        for measured in traffic(chosen, experts, processes, options.hidden_size)
    ]
    options.results.mkdir(parents=True, exist_ok=True)
    write_json(options.results / "traffic.json", {"hidden_size": options.hidden_size, "rows": rows})
    figure(rows).savefig(options.results / "traffic.png", dpi=150)
    print(table(rows))


def random_routing(tokens: int, heads: int, experts: int, top_k: int) -> tuple[np.ndarray, int]:
    """Each sub-token's experts without repetition, all alike: (1, tokens, heads, top_k), and their number."""
    order = np.random.default_rng(0).random((1, tokens, heads, experts)).argsort(axis=-1)
    return order[..., :top_k], experts


def recorded_routing(folder: str, text: str, tokens: int) -> tuple[np.ndarray, int]:
    """Of every MH-MoE layer on a text's first tokens: (layers, tokens, heads, top_k), and the number of experts."""
    model, tokenizer, _ = load_causal_lm(folder)
    block_size = min(256, model.config.max_position_embeddings)
    blocks = pack(load_file(text), tokenizer, block_size, -(-tokens // block_size))["input_ids"][:]
    found = []
    with RoutingRecorder(model.eval()) as recorder, torch.no_grad():
        for block in tqdm(blocks, desc=Path(folder).name):
            model(input_ids=torch.tensor([block]))
            heads = model.config.num_moe_heads
            found.append(np.stack([chosen.view(block_size, heads, -1).numpy() for chosen in recorder.chosen]))
    return np.concatenate(found, axis=1), model.config.num_routed_experts


def traffic(
    chosen: np.ndarray, experts: int, processes: int, hidden_size: int, bytes_of_a_number: int = 2
) -> list[dict]:
    """
    Args:
        chosen: (layers, tokens, heads, top_k), experts.

    Returns:
        For each of `WAYS`, over all layers: the bytes that a token sends there and back, `bytes_per_token`, and how
        much more the busiest process receives than the mean of them, `max_over_mean`, of the layer where it is most.
    """
    layers, tokens, heads, _ = chosen.shape
    size = hidden_size // heads * BYTES
    home = (np.arange(tokens) * processes // tokens)[:, None]  # of a token
    rows = []
    for way in WAYS:
        sent, skew = 0, 1.0
        for layer in chosen:
            if way == "HP":
                group = min(heads, processes)
                target = home // group * group + np.arange(heads) * group // heads  # (tokens, heads)
                received = np.bincount(target.ravel(), minlength=processes)
                remote = target != home
            else:
                target = layer * processes // experts  # (tokens, heads, top_k)
                if way == "EP, once":
                    ordered = np.sort(target, axis=-1)
                    first = np.concatenate([np.ones_like(ordered[..., :1], bool), np.diff(ordered) > 0], axis=-1)
                else:
                    ordered, first = target, np.ones_like(target, bool)
                received = np.bincount(ordered[first], minlength=processes)
                remote = (ordered != home[..., None]) & first
            sent += remote.sum()
            skew = max(skew, received.max() / received.mean())
        rows.append(
            {
                "way": way,
                "bytes_per_token": 2 * sent * size / (layers * tokens),
                "max_over_mean": float(skew),
            }
        )
    return rows


def table(rows: list[dict]) -> str:
    """In Markdown: a line for each routing and way, a column for each number of processes."""
    numbers = sorted({row["processes"] for row in rows})
    lines = [
        "| routing | | " + " | ".join(f"{number} processes" for number in numbers) + " |",
        "|---|---|" + "---:|" * len(numbers),
    ]
    for routing in dict.fromkeys(row["routing"] for row in rows):
        for way in WAYS:
            own = {row["processes"]: row for row in rows if (row["routing"], row["way"]) == (routing, way)}
            cells = [
                f"{own[number]['bytes_per_token'] / 1024:.1f} (x{own[number]['max_over_mean']:.2f})"
                for number in numbers
            ]
            lines.append(f"| {routing} | {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(rows: list[dict]) -> Figure:
    """Left what a token sends, right what the busiest process receives for each token of its own."""
    drawn = Figure(figsize=(10, 4.2), layout="constrained")
    drawn.suptitle("What does a token send in one MH-MoE layer's forward, there and back?", fontsize="medium")
    titles = ("sent, on average", "received by the busiest process")
    for axes, title in zip(drawn.subplots(1, 2, sharey=True), titles, strict=True):
        for colour, routing in enumerate(dict.fromkeys(row["routing"] for row in rows)):
            for way, style in zip(WAYS, ("-", "--", ":"), strict=True):
                own = [row for row in rows if (row["routing"], row["way"]) == (routing, way)]
                heights = [
                    row["bytes_per_token"] / 1024 * (row["max_over_mean"] if title != titles[0] else 1) for row in own
                ]
                axes.plot(
                    [row["processes"] for row in own],
                    heights,
                    style,
                    color=f"C{colour}",
                    marker="o",
                    markersize=4,
                    label=f"{way}: {routing}",
                )
        axes.set(xscale="log", xlabel="processes", title=title)
        axes.set_xticks(PROCESSES, [str(number) for number in PROCESSES])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    drawn.axes[0].set(ylabel="KiB per token", ylim=(0, None))
    handles, labels = drawn.axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    return drawn


if __name__ == "__main__":
    main()
