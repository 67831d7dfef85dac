"""
How far are models from the one that they were made of? Perplexity on texts, as a ratio to the first model's.

    python benchmarks/ratios.py DENSE CONVERTED TRAINED --text other-books.jsonl wiki.txt

Each folder is a row of the table.
"""

import argparse
import json
from pathlib import Path

from calibration import perplexity

from mhmoe.conversion.calibration import read_rows
from mhmoe.conversion.checkpoint import DenseCheckpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--text", nargs="+", required=True, type=Path, help="texts to measure perplexity on")
    parser.add_argument("--text_tokens", type=int, default=8192)
    parser.add_argument("--results", type=Path, help="a JSON file to write")
    options = parser.parse_args()
    checkpoint = DenseCheckpoint(str(options.dense))
    texts = {file.name: read_rows(checkpoint, file, options.text_tokens) for file in options.text}
    rows = []
    for folder in [options.dense, *options.models]:
        found = {name: perplexity(folder, text) for name, text in texts.items()}
        ratios = {name: value / (rows[0]["perplexity"][name] if rows else value) for name, value in found.items()}
        rows.append({"model": folder.name, "perplexity": found, "ratio": ratios})
    if options.results:
        options.results.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print("| model | " + " | ".join(texts) + " |")
    print("|---|" + "---:|" * len(texts))
    for row in rows:
        print(f"| {row['model']} | " + " | ".join(f"{ratio:.3f}" for ratio in row["ratio"].values()) + " |")


if __name__ == "__main__":
    main()
