"""
What makes a training step of a small model faster on a CPU? Processor time of a step (forward, backward, clipping,
AdamW) of the models of pretraining.sh, under settings that mhmoe pretrain and mhmoe train take too.

    OMP_NUM_THREADS=1 python benchmarks/training_step.py
    OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000 python benchmarks/training_step.py

In one thread, processor time is nearly the same on a busy machine. Settings take turns. In the second call the C
library keeps memory that every step gives back. Both write into results/training_step.json; the table has what is
there for this processor.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from timing import alternate, machine, merge, summary
from transformers import AutoModelForCausalLM

from mhmoe import MHMoEConfig


RESULTS = Path(__file__).parent / "results" / "training_step.json"
BLOCK, BATCH, VOCABULARY = 128, 8, 4096
SIZES = {"hidden_size": 168, "num_hidden_layers": 4, "tie_word_embeddings": True, "max_position_embeddings": BLOCK}
MODELS = ("p2-dense", "p2-smoe", "p2-mhmoe-head3")
EAGER = {"attn_implementation": "eager"}
BASE = "float32, MHMOE_NATIVE=0"
SETTINGS = {  # of the model, whether in bfloat16, and the variable that allows C
    BASE: ({}, False, "0"),
    "float32": ({}, False, "1"),
    "--bf16": ({}, True, "1"),
    "--bf16 --attn_implementation eager": (EAGER, True, "1"),
    "the same, MHMOE_NATIVE=0": (EAGER, True, "0"),
    "the same, --experts_implementation grouped_mm": (EAGER | {"experts_implementation": "grouped_mm"}, True, "0"),
}


def step_of(preset: str, options: dict, bf16: bool, in_c: str) -> Callable[[], None]:
    """A function that trains a model for a step, each time on other random tokens."""
    torch.manual_seed(0)
    config = MHMoEConfig.from_preset(preset, vocab_size=VOCABULARY, **SIZES)
    model = AutoModelForCausalLM.from_config(config, **options).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        os.environ["MHMOE_NATIVE"] = in_c
        tokens = torch.randint(VOCABULARY, (BATCH, BLOCK))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(input_ids=tokens, labels=tokens, output_router_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def table(rows: list[dict]) -> str:
    lines = [f"| settings | memory | {' | '.join(MODELS)} |", "|---|---|" + "---:|" * len(MODELS)]
    for setting in SETTINGS:
        for memory in ("given back", "kept"):
            found = {row["model"]: row for row in rows if (row["setting"], row["memory"]) == (setting, memory)}
            cells = (
                f"{found[model]['ms']:.0f} ({found[model]['tokens_per_second']:,.0f})" if model in found else ""
                for model in MODELS
            )
            if found:
                lines.append(f"| {setting} | {memory} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\nMilliseconds of a step, tokens per second of processor time.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=20, help="seconds for each model (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args()
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else []
    memory = "kept" if "MALLOC_MMAP_MAX_" in os.environ else "given back"
    for model in () if options.table else MODELS:
        device = torch.device("cpu")
        times, _ = alternate(
            {setting: step_of(model, *settings) for setting, settings in SETTINGS.items()},
            device,
            options.budget,
            most=60,
            clock="cpu",
        )
        measured = []
        for setting, own in times.items():
            row = {"model": model, "setting": setting, "memory": memory, **summary(own, times[BASE])}
            measured.append(row | {"tokens_per_second": 1000 * BLOCK * BATCH / row["ms"], **machine(device)})
        rows = merge(RESULTS, measured, ("device", "model", "setting", "memory"))
    here = machine(torch.device("cpu"))["device"]
    print(table([row for row in rows if row["device"] == here]))


if __name__ == "__main__":
    main()
