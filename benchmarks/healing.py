"""
Which conversion gives the best model after N tokens? Continue training several checkpoints on the same batches with
the same optimiser, and draw validation perplexity against tokens and against training FLOPs, from N = 0 on.

    python benchmarks/healing.py NAME=FOLDER NAME=FOLDER ... --train_file books.jsonl --validation_file more.jsonl \
        --tokens 100000 --output_dir outputs/healing

Every checkpoint must have the same tokenizer. Writes healing.json, healing.md and healing.png; a second run with the
same output folder adds to what is there, so that the models can be trained one by one.
"""

import argparse
import json
import math
from pathlib import Path

import matplotlib
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, get_cosine_schedule_with_warmup

from mhmoe.configuration import costs
from mhmoe.training import causal_batch, load_file, pack


matplotlib.use("Agg")


def training_flops_per_token(model: PreTrainedModel) -> int:
    """Six FLOPs for every multiply-add with a weight (two forward, four backward); attention scores are left out."""
    return 6 * costs(model.config).multiply_adds


@torch.inference_mode()
def perplexity(model: PreTrainedModel, batches: list[dict[str, torch.Tensor]]) -> float:
    model.eval()
    losses = [model(**batch).loss.item() for batch in batches]  # equal blocks, so the mean of the means is the mean
    model.train()
    return math.exp(sum(losses) / len(losses))


def heal(name: str, folder: str, train: list[dict], validation: list[dict], options: argparse.Namespace) -> dict:
    """The curve of one model: tokens, FLOPs and perplexity at each evaluation."""
    torch.manual_seed(options.seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(options.device)
    flops_per_token = training_flops_per_token(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, len(train) // 20, len(train))
    balance = {"output_router_logits": True} if model.config.model_type == "mhmoe" else {}
    autocast = torch.autocast(torch.device(options.device).type, torch.bfloat16, enabled=options.bf16)
    curve = [{"tokens": 0, "flops": 0, "perplexity": perplexity(model, validation)}]
    for step, batch in enumerate(tqdm(train, desc=name, unit="step"), start=1):
        with autocast:
            loss = model(**batch, **balance).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % options.eval_every == 0 or step == len(train):
            tokens = step * batch["input_ids"].numel()
            curve.append(
                {
                    "tokens": tokens,
                    "flops": tokens * flops_per_token,
                    "perplexity": perplexity(model, validation),
                }
            )
    return {"curve": curve, "flops_per_token": flops_per_token, "parameters": model.num_parameters()}


def draw(results: dict[str, dict], file: Path) -> None:
    from matplotlib import pyplot

    # curves that stay far above the best start would flatten all the others
    ceiling = 3 * min(result["curve"][0]["perplexity"] for result in results.values())
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for axis, quantity in zip(axes, ("tokens", "flops"), strict=True):
        for name, result in results.items():
            lowest = min(point["perplexity"] for point in result["curve"])
            if lowest > ceiling:
                axis.plot([], [], label=f"{name} (above the chart: {lowest:,.0f} at best)")
                continue
            axis.plot(
                [point[quantity] for point in result["curve"]],
                [point["perplexity"] for point in result["curve"]],
                marker=".",
                label=name,
            )
        axis.set_xlabel("training tokens" if quantity == "tokens" else "training FLOPs")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation perplexity")
    axes[1].legend()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def table(results: dict[str, dict]) -> str:
    lines = [
        "| start | parameters | training FLOPs per token | at 0 tokens | halfway | end |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, result in results.items():
        curve = [point["perplexity"] for point in result["curve"]]
        figures = " | ".join(f"{value:,.2f}" for value in (curve[0], curve[len(curve) // 2], curve[-1]))
        lines.append(f"| {name} | {result['parameters']:,} | {result['flops_per_token']:,} | {figures} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--validation_file", required=True)
    parser.add_argument("--tokens", type=int, default=100_000, help="to train on (default: %(default)s)")
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=4, help="blocks in a step (default: %(default)s)")
    parser.add_argument("--validation_blocks", type=int, default=16)
    parser.add_argument("--eval_every", type=int, default=20, help="steps (default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--bf16", action="store_true", help="train under bfloat16 autocast; perplexity stays float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/healing"))
    options = parser.parse_args()
    models = dict(model.split("=", 1) for model in options.models)

    tokenizer = AutoTokenizer.from_pretrained(next(iter(models.values())))
    steps = options.tokens // (options.block_size * options.batch_size)

    def batches(file: str, blocks: int) -> list[dict[str, torch.Tensor]]:
        packed = pack(load_file(file), tokenizer, options.block_size, blocks)
        return [
            {key: value.to(options.device) for key, value in causal_batch(rows).items()}
            for rows in (
                packed.select(range(start, start + options.batch_size)).to_list()
                for start in range(0, len(packed) - options.batch_size + 1, options.batch_size)
            )
        ]

    train = batches(options.train_file, steps * options.batch_size)
    validation = batches(options.validation_file, options.validation_blocks)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    report = options.output_dir / "healing.json"
    results = json.loads(report.read_text()) if report.exists() else {}
    for name, folder in models.items():
        results[name] = heal(name, folder, train, validation, options)
        report.write_text(json.dumps(results, indent=2) + "\n")
    (options.output_dir / "healing.md").write_text(table(results))
    draw(results, options.output_dir / "healing.png")
    print(table(results))


if __name__ == "__main__":
    main()
