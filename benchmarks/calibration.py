"""
How near does strategy `calibrated` start, what does each of its steps give, and how much calibration text is enough?

    python benchmarks/calibration.py SOURCE --calibration books.jsonl --text other-books.jsonl wiki.txt \
        --calibration_tokens 4096 16384 --output_dir outputs/calibration

Converts SOURCE at the same sizes in four ways for every number of tokens and measures perplexity on every text, as a
ratio to the dense model's: the hottest neurons merely kept, the ridge regression alone, the whole strategy, and (once)
strategy `random`. Writes calibration.json, calibration.md and calibration.png; a second run with the same output
folder adds to what is there.
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import matplotlib
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from mhmoe.conversion import convert
from mhmoe.conversion.calibration import read_rows
from mhmoe.conversion.checkpoint import DenseCheckpoint
from mhmoe.conversion.strategies.calibrated import KEEP_AS_THEY_ARE, Calibrated


matplotlib.use("Agg")
WAYS = ("random experts", "merely kept", "ridge alone", "calibrated")


@torch.inference_mode()
def perplexity(folder: Path, rows: torch.Tensor) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = [model(row[None], labels=row[None]).loss.item() for row in tqdm(rows, desc=folder.name, leave=False)]
    return math.exp(sum(losses) / len(losses))  # equal rows, so the mean of the means is the mean


def converted(source: str, way: str, tokens: int, options: argparse.Namespace, folder: Path) -> Path:
    output = folder / way.replace(" ", "-")
    if way == "random experts":
        return convert(source, output, strategy="random", seed=options.seed)
    ridge = KEEP_AS_THEY_ARE if way == "merely kept" else Calibrated.ridge
    with patch.object(Calibrated, "ridge", ridge):
        return convert(
            source,
            output,
            strategy="calibrated",
            calibration=options.calibration,
            calibration_tokens=tokens,
            router_init=options.router_init,
            distillation_steps=options.distillation_steps if way == "calibrated" else 0,
            seed=options.seed,
        )


def table(results: dict) -> str:
    texts = list(results["dense"])
    lines = [
        "| start | calibration tokens | seconds | " + " | ".join(texts) + " |",
        "|---|---:|---:|" + "---:|" * len(texts),
    ]
    dense = " | ".join(f"{results['dense'][text]:.2f}" for text in texts)
    lines.append(f"| dense, perplexity | | | {dense} |")
    for way in WAYS:
        for tokens, run in sorted(results.get(way, {}).items(), key=lambda entry: int(entry[0])):
            ratios = " | ".join(f"x{run['perplexity'][text] / results['dense'][text]:,.3f}" for text in texts)
            used = f"{int(tokens):,}" if int(tokens) else ""
            lines.append(f"| {way} | {used} | {run['seconds']:.0f} | {ratios} |")
    return "\n".join(lines) + "\n"


def draw(results: dict, file: Path) -> None:
    from matplotlib import pyplot

    texts = list(results["dense"])
    figure, axes = pyplot.subplots(1, len(texts), figsize=(5.5 * len(texts), 4), layout="constrained", squeeze=False)
    for axis, text in zip(axes[0], texts, strict=True):
        for way in WAYS[1:]:
            runs = sorted((int(tokens), run["perplexity"][text]) for tokens, run in results.get(way, {}).items())
            axis.plot(
                [tokens for tokens, _ in runs],
                [value / results["dense"][text] for _, value in runs],
                marker="o",
                label=way,
            )
        axis.set(xscale="log", xlabel="calibration tokens", title=text)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("perplexity, times the dense model's")
    axes[0][0].legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", nargs="+", required=True, help="texts to measure perplexity on")
    parser.add_argument("--text_tokens", type=int, default=8192)
    parser.add_argument("--calibration_tokens", type=int, nargs="+", default=[16384])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--distillation_steps", type=int, default=60)
    parser.add_argument("--router_init", default="random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True)
    options = parser.parse_args()

    options.output_dir.mkdir(parents=True, exist_ok=True)
    file = options.output_dir / "calibration.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    checkpoint = DenseCheckpoint(options.source)
    texts = {
        Path(text).name.split(".zst")[0]: read_rows(checkpoint, Path(text), options.text_tokens)
        for text in options.text
    }
    if "dense" not in results:
        results["dense"] = {text: perplexity(checkpoint.folder, rows) for text, rows in texts.items()}
    for tokens in options.calibration_tokens:
        for way in options.ways:
            tokens_used = 0 if way == "random experts" else tokens
            if str(tokens_used) in results.setdefault(way, {}):
                continue
            with tempfile.TemporaryDirectory() as scratch:
                begin = time.monotonic()
                folder = converted(options.source, way, tokens, options, Path(scratch))
                results[way][str(tokens_used)] = {
                    "seconds": time.monotonic() - begin,
                    "perplexity": {text: perplexity(folder, rows) for text, rows in texts.items()},
                    "figures": json.loads((folder / "conversion.json").read_text()).get("figures"),
                }
            file.write_text(json.dumps(results, indent=2) + "\n")
            (options.output_dir / "calibration.md").write_text(table(results))
            draw(results, options.output_dir / "calibration.png")
    print(table(results))


if __name__ == "__main__":
    main()
