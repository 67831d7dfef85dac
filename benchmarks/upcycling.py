"""
Does a conversion end below the dense model that goes on training? A small dense Llama is trained from scratch
on books, converted with every strategy, and it and all conversions go on with the same batches of other text.

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000 OMP_NUM_THREADS=1 \\
    python benchmarks/upcycling.py --train_file books.jsonl --validation_file more_books.jsonl   # goes on where it was
    python benchmarks/upcycling.py --table                              # of all that was measured
    python benchmarks/upcycling.py ... --starts dense anchored_128 --tokens 2048000 --results results/longer.json

Everything is done by `mhmoe pretrain`, `mhmoe convert` and `mhmoe train`. The learning rate of each start is the best
of LEARNING_RATES on a short run with a seed and validation text of its own. A seed draws the batches. Each run is a
row of results/upcycling.json; one that is there already is not repeated.

- Equal tokens: all start from the same weights and see the same `--tokens`.
- Equal FLOPs: a start that costs more than the dense model is trained again with fewer tokens and a shorter schedule.
- `anchored_128` has four times as many experts as `anchored`, of which a token reaches as many.
- `narrowed` starts like `anchored`, with the sizes of `calibrated`, and drops neurons while it is trained until it has
  as many as that. What it costs is the mean over its steps.

The table has mean and standard deviation over seeds; the difference is to the dense model with the same seed.
"""

import argparse
import json
import math
import os
import random
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from matplotlib.figure import Figure
from timing import machine, merge
from transformers import LlamaConfig, TrainingArguments

from mhmoe.backends.cpu.processor import multiplies_bf16
from mhmoe.configuration import costs
from mhmoe.conversion import convert
from mhmoe.errors import UserError
from mhmoe.loading import load_config
from mhmoe.text import json_records
from mhmoe.training import PretrainArguments, TrainArguments, measured, pretrain, train


RESULTS = Path(__file__).parent / "results" / "upcycling.json"
KEYS = ("start", "seed", "tokens", "learning_rate")
LLAMA = {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}
VOCABULARY, BLOCK, BATCH = 1024, 128, 16
STEP = BLOCK * BATCH  # tokens
TOKENS, TUNING_TOKENS = 500 * STEP, 100 * STEP
# parameters of the dense model: its sizes, the tokens that it is trained on first, and the learning rate of that
SIZES = {
    "0.7M": (
        {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "initializer_range": 0.05},
        2000 * STEP,
        4e-3,
    ),
    "2.3M": (
        {"hidden_size": 192, "intermediate_size": 640, "num_hidden_layers": 4, "initializer_range": 0.04},
        10_000 * STEP,
        2e-3,
    ),
}
STARTS = {
    "dense": None,
    "exact": {"strategy": "exact"},
    "anchored": {"strategy": "anchored"},
    "calibrated": {"strategy": "calibrated"},
    "anchored_128": {"strategy": "anchored", "num_experts": 128},
    "narrowed": {"strategy": "anchored"},
    "random": {"strategy": "random", "match": "dense"},
}
CALIBRATED_SIZES = ("num_moe_heads", "num_experts", "num_experts_per_tok", "moe_intermediate_size")
LEARNING_RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # tried from the third one on, as long as it gets better
TUNING_SEED = 100
EVALUATIONS = 2
NEARLY = 1.02  # a difference in FLOPs that does not count
CHARACTERS = 4000  # of a piece of a book
VALIDATION_CHARACTERS = 90_000, 60_000  # of the text to report on, and of the one to tune on
SETTINGS = {
    "per_device_train_batch_size": BATCH,
    "per_device_eval_batch_size": 64,
    "weight_decay": 0.01,
    "adam_beta2": 0.98,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "eval_strategy": "steps",
    "save_strategy": "no",
    "logging_steps": 100,
    "report_to": "none",
    "bf16": multiplies_bf16(),  # elsewhere float32 is the faster one on a CPU
    "use_cpu": True,
    "disable_tqdm": True,
}
RUN = {"block_size": BLOCK, "attn_implementation": "eager", "overwrite": True}


def write_pieces(source: str, files: dict[Path, int]) -> None:
    """Cut books into pieces, and write so many characters of them into each of `files`, in a random order."""
    pieces = list(_pieces(source))
    random.Random(0).shuffle(pieces)
    for file, characters in files.items():
        if len(pieces) * CHARACTERS < characters:
            raise UserError(f"{source}: is too short; give more text")
        chosen = [pieces.pop() for _ in range(math.ceil(characters / CHARACTERS))]
        file.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in chosen), encoding="utf-8")


def _pieces(source: str) -> Iterator[str]:
    for _, record in json_records(Path(source)):
        text = record["text"]
        yield from (text[start : start + CHARACTERS] for start in range(0, len(text), CHARACTERS))


def prepare(folder: Path, train_file: str, validation_file: str, size: str) -> None:
    """Texts, the dense model and its conversions, each unless it is there."""
    sizes, pretraining_tokens, pretraining_rate = SIZES[size]
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tuning.jsonl").exists():
        # a token is about three characters; of the text to go on with, a run sees a part that its seed draws
        write_pieces(
            train_file, {folder / "pretraining.jsonl": 4 * pretraining_tokens, folder / "more.jsonl": 8 * TOKENS}
        )
        validation, tuning = VALIDATION_CHARACTERS
        write_pieces(validation_file, {folder / "validation.jsonl": validation, folder / "tuning.jsonl": tuning})
    dense = folder / "dense"
    if not (dense / "README.md").exists():
        LlamaConfig(**LLAMA, **sizes, max_position_embeddings=BLOCK).save_pretrained(folder / "config")
        pretrain(
            PretrainArguments(
                config_name=str(folder / "config"),
                vocab_size=VOCABULARY,
                train_file=str(folder / "pretraining.jsonl"),
                validation_file=str(folder / "validation.jsonl"),
                num_train_tokens=pretraining_tokens,
                **RUN,
            ),
            TrainingArguments(
                str(dense),
                learning_rate=pretraining_rate,
                eval_steps=1 / EVALUATIONS,
                seed=0,
                # not at its end yet: what a schedule's decline brings is left to what goes on from here
                **SETTINGS | {"lr_scheduler_type": "constant_with_warmup"},
            ),
        )
    for name, options in STARTS.items():
        if options is not None and not (folder / name).exists():
            more = {"calibration": folder / "pretraining.jsonl"} if name == "calibrated" else {}
            if name == "narrowed":
                calibrated = load_config(folder / "calibrated", "calibrated")
                more = {size: getattr(calibrated, size) for size in CALIBRATED_SIZES}
            convert(dense, folder / name, **options, **more)


def run(folder: Path, start: str, seed: int, tokens: int, learning_rate: float) -> dict:
    """Go on training `start`, and measure it on the way; with the seed for tuning, on the text for that."""
    held_out, evaluations = ("tuning.jsonl", 1) if seed == TUNING_SEED else ("validation.jsonl", EVALUATIONS)
    narrowing = narrow(folder) if start == "narrowed" else {}
    with tempfile.TemporaryDirectory() as output:
        trainer = train(
            str(folder / start),
            TrainArguments(
                train_file=str(folder / "more.jsonl"),
                validation_file=str(folder / held_out),
                **RUN,
                **narrowing,
            ),
            TrainingArguments(
                output,
                max_steps=tokens // STEP,
                learning_rate=learning_rate,
                eval_steps=tokens // STEP // evaluations,
                seed=seed,
                **SETTINGS,
            ),
        )
    curve = [[entry["step"] * STEP, entry["eval_cross_entropy"]] for entry in measured(trainer)]
    return {
        **dict(zip(KEYS, (start, seed, tokens, learning_rate), strict=True)),
        "loss": curve[-1][1],
        "curve": curve,
        "validation_tokens": measured(trainer)[-1]["eval_tokens"],
        "parameters": costs(trainer.model.config).parameters,
        "multiply_adds": multiply_adds(folder, start),
        "seconds": round(
            next(entry["train_runtime"] for entry in trainer.state.log_history[::-1] if "train_runtime" in entry)
        ),
        **machine(torch.device("cpu")),
    }


def narrow(folder: Path) -> dict[str, int]:
    """To what the shared experts of `narrowed` are narrowed."""
    return {"shared_expert_intermediate_size": load_config(folder / "calibrated").shared_expert_intermediate_size}


def multiply_adds(folder: Path, start: str) -> int:
    """Per token, with weights, forward: the mean over a run."""
    config = load_config(folder / start, start)
    counted = costs(config).multiply_adds
    if start != "narrowed":
        return counted
    config.shared_expert_intermediate_size = narrow(folder)["shared_expert_intermediate_size"]
    narrowed = costs(config).multiply_adds
    # of what is dropped, a share (1 - t)^3 is left at each time t of the part of the run that dropping takes
    return round(narrowed + TrainArguments.narrowing_share / 4 * (counted - narrowed))


def tuned(rows: list[dict], start: str) -> float:
    """The learning rate that was best for a start."""
    return min(
        (row["loss"], row["learning_rate"]) for row in rows if row["start"] == start and row["seed"] == TUNING_SEED
    )[1]


def equal_flops_tokens(folder: Path, start: str, tokens: int) -> int:
    """Tokens, in whole steps, that cost no more than these `tokens` of the dense model."""
    dense, own = (multiply_adds(folder, name) for name in ("dense", start))
    return tokens if own <= NEARLY * dense else tokens * dense // own // STEP * STEP


def measure(folder: Path, starts: list[str], seeds: list[int], tokens: int, results: Path) -> None:
    """All runs that are not in the results yet: those to tune, then seed by seed."""

    def once(start: str, seed: int, tokens: int, learning_rate: float) -> None:
        wanted = (start, seed, tokens, learning_rate)
        if not any(tuple(row[key] for key in KEYS) == wanted for row in read(results)):
            merge(results, [run(folder, *wanted)], KEYS)

    for start in starts:
        for rates in (LEARNING_RATES[2:], LEARNING_RATES[2::-1]):
            for learning_rate in rates:
                once(start, TUNING_SEED, TUNING_TOKENS, learning_rate)
                if tuned(read(results), start) != learning_rate:
                    break
    best = {start: tuned(read(results), start) for start in starts}
    for seed in seeds:
        for start in starts:
            once(start, seed, tokens, best[start])
    for seed in seeds:
        for start in starts:
            once(start, seed, equal_flops_tokens(folder, start, tokens), best[start])


def read(results: Path) -> list[dict]:
    return json.loads(results.read_text(encoding="utf-8")) if results.is_file() else []


def runs_of(rows: list[dict], start: str, equal: str) -> dict[int, dict]:
    """By seed, those of equal "tokens", or of equal "flops": the longest that cost no more than the dense model's."""
    found = [row for row in rows if row["seed"] != TUNING_SEED]
    dense = [row for row in found if row["start"] == "dense"]
    if equal == "flops":
        most = max(map(cost, dense), default=0)
        found = [row for row in found if cost(row) <= NEARLY * most]
    else:
        tokens = max((row["tokens"] for row in dense), default=0)
        found = [row for row in found if row["tokens"] >= tokens]
    found = [row for row in found if row["start"] == start]
    most = max((row["tokens"] for row in found), default=0)
    return {row["seed"]: row for row in found if row["tokens"] == most}


def cost(row: dict) -> int:
    """Multiply-adds with weights, forward, of a run."""
    return row["tokens"] * row["multiply_adds"]


def spread(values: list[float], digits: int = 5, sign: str = "") -> str:
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.{digits}f}{deviation}"


def table(rows: list[dict]) -> str:
    lines = [
        "| start | parameters | multiply-adds per token | learning rate | at 0 tokens | equal | tokens "
        "| validation loss | against dense | seeds |",
        "|---|---:|---:|---:|---:|---|---:|---:|---:|---:|",
    ]
    for equal in ("tokens", "flops"):
        dense = runs_of(rows, "dense", equal)
        for start in STARTS:
            if not (own := runs_of(rows, start, equal)) or (start, equal) == ("dense", "flops"):
                continue
            row = next(iter(own.values()))
            paired = [own[seed]["loss"] - dense[seed]["loss"] for seed in sorted(own.keys() & dense.keys())]
            against = spread(paired, sign="+") if start != "dense" and paired else ""
            lines.append(
                f"| {start} | {row['parameters']:,} | {row['multiply_adds']:,} | {row['learning_rate']:g} | "
                f"{row['curve'][0][1]:.4f} | {'FLOPs' if equal == 'flops' else equal} | {row['tokens']:,} | "
                f"{spread([entry['loss'] for entry in own.values()])} | {against} | {len(own)} |"
            )
    return "\n".join(lines) + "\n"


def draw(rows: list[dict], file: Path) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    by_tokens, by_flops = figure.subplots(1, 2, sharey=True)
    for number, start in enumerate(STARTS):
        for axes, equal in ((by_tokens, "tokens"), (by_flops, "flops")):
            own = list(runs_of(rows, start, equal).values())
            if not own:
                continue
            scale = 1 if equal == "tokens" else 6 * own[0]["multiply_adds"]
            places = [tokens * scale for tokens, _ in own[0]["curve"]]
            losses = [[loss for _, loss in row["curve"]] for row in own]
            means = [statistics.mean(values) for values in zip(*losses, strict=True)]
            low, high = ([choose(values) for values in zip(*losses, strict=True)] for choose in (min, max))
            label = "random (above the chart)" if start == "random" else start
            axes.plot(places, means, marker=".", label=label, color=f"C{number}")
            axes.fill_between(places, low, high, color=f"C{number}", alpha=0.2, linewidth=0)
    shown = [row for row in rows if row["seed"] != TUNING_SEED and row["start"] != "random"]  # which is far above
    if losses := [loss for row in shown for _, loss in row["curve"]]:
        margin = (max(losses) - min(losses)) / 8
        by_tokens.set_ylim(min(losses) - margin, max(losses) + 3 * margin)
    by_tokens.set_ylabel("validation loss")
    by_tokens.set_xlabel("tokens after the conversion")
    by_flops.set_xlabel("training FLOPs after the conversion")
    by_flops.legend()  # all starts have runs there
    by_tokens.set_title("the same tokens: mean and range of seeds", fontsize="medium")
    by_flops.set_title("the same FLOPs", fontsize="medium")
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file")
    parser.add_argument("--validation_file")
    parser.add_argument("--size", default="0.7M", choices=list(SIZES), help="of the dense model")
    parser.add_argument("--starts", nargs="+", default=list(STARTS), choices=list(STARTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a run with equal tokens")
    parser.add_argument("--results", type=Path, default=RESULTS, help="another file for another --size or --tokens")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/upcycling"), help="of one --size")
    parser.add_argument("--table", action="store_true", help="only print the table, and draw")
    options = parser.parse_args()
    if not options.table:
        if not (options.train_file and options.validation_file):
            parser.error("give --train_file and --validation_file, or --table")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        prepare(options.output_dir, options.train_file, options.validation_file, options.size)
        measure(options.output_dir, options.starts, options.seeds, options.tokens // STEP * STEP, options.results)
    rows = read(options.results)
    print(table(rows))
    draw(rows, options.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
