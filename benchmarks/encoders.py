"""
Small encoders from scratch on the CPU: dense, sparse MoE and MH-MoE of equal multiply-adds, and the two sparse ones of
equal parameters (P2, arXiv 2411.16205), with MoE in every second layer.

    digits    ViT on scikit-learn's digits: 1,797 pictures of 8x8 pixels, of which a fifth is kept for testing
    easy-vqa  ViLT on easy-VQA (pip install --no-deps easy-vqa): questions on 64x64 pictures of coloured shapes
    easy-vqa-masked  the same, half of the words in question and answer masked, as P1 masks pairs

    python benchmarks/encoders.py digits                      # three models, three seeds
    python benchmarks/encoders.py easy-vqa --seeds 0          # one seed; add the others in further calls
    python benchmarks/encoders.py --table                     # of all that was measured

Each run is a row of results/encoders.json; one that is there already is not repeated. The table has the mean over
seeds and the standard deviation, encoders.png the measure on the test rows in the course of training, and
encoders_patches.png the experts that the patches of one digit reach.
"""

import argparse
import json
import statistics
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from timing import machine, merge
from transformers import Trainer, TrainingArguments, set_seed

import mhmoe
from mhmoe.configuration.parity import match_smoe
from mhmoe.encoders.costs import encoder_costs
from mhmoe.encoders.modeling_mhmoe_encoders import MHMoEEncoder
from mhmoe.evaluation import PatchRouting, save_patch_figure


RESULTS = Path(__file__).parent / "results" / "encoders.json"
WIDTH, FFN, HEADS, TOP_K = 64, 256, 4, 2
ENCODER = {
    "hidden_size": WIDTH,
    "intermediate_size": FFN,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "layer_norm_eps": 1e-6,
}
BACKEND = "grouped_mm"  # with experts as small as these, a tenth faster than the default
SPARSE = {"decoder_sparse_step": 2, "num_experts_per_tok": TOP_K, "output_router_logits": True}


def models() -> dict[str, dict[str, Any]]:
    """The MH-MoE fields of each: FFNs of equal multiply-adds, and of the two sparse ones, of equal parameters."""
    parity = match_smoe(
        WIDTH, HEADS, TOP_K, reference_size=FFN // TOP_K, reference_experts=16, reference_top_k=TOP_K, matrices=2
    )
    sizes = {"num_experts": parity.num_experts, "moe_intermediate_size": parity.moe_intermediate_size}
    return {
        "dense": {"mlp_only_layers": list(range(ENCODER["num_hidden_layers"]))},
        "SMoE": {**SPARSE, "num_moe_heads": 1, "num_experts": 16, "moe_intermediate_size": FFN // TOP_K},
        "MH-MoE": {**SPARSE, "num_moe_heads": HEADS, **sizes},
    }


@dataclass
class Task:
    """Rows to train on and to test on, the model for them, and how long it trains."""

    train: list[dict]
    test: list[dict]
    make: Callable[[dict], MHMoEEncoder]
    measure: Callable[[Any], dict[str, float]]
    steps: int
    batch: int
    learning_rate: float


def digits() -> Task:
    from sklearn.datasets import load_digits

    data = load_digits()
    pictures = torch.tensor(data.images[:, None] / 8 - 1, dtype=torch.float32)
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"pixel_values": pictures[index], "labels": int(data.target[index])} for index in order]
    held_out = len(rows) // 5
    fields = {**ENCODER, "image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    return Task(
        train=rows[held_out:],
        test=rows[:held_out],
        make=lambda moe: mhmoe.MHMoEViTForImageClassification(mhmoe.MHMoEViTConfig(**fields, **moe)),
        measure=accuracy,
        steps=300,
        batch=64,
        learning_rate=1e-3,
    )


PADDING, START, MASK = range(3)  # ids, before those of words


def easy_vqa(masked: bool = False) -> Task:
    """Questions to answer; or, `masked`, questions with their answers, of which half of the words are to be found."""
    import easy_vqa as data
    from PIL import Image

    questions = {"train": data.get_train_questions(), "test": data.get_test_questions()}
    paths = {"train": data.get_train_image_paths(), "test": data.get_test_image_paths()}
    answers = data.get_answers()
    words = sorted({word for text in questions["train"][0] for word in text.rstrip("?").split()} | set(answers))
    ids = {word: number for number, word in enumerate(words, start=MASK + 1)}
    longest = 2 + max(len(text.split()) for text in questions["train"][0])

    def picture(path: str) -> torch.Tensor:
        with Image.open(path) as image:
            return torch.tensor(np.asarray(image.convert("RGB")), dtype=torch.float32).permute(2, 0, 1) / 127.5 - 1

    def rows(part: str, count: int | None = None) -> list[dict]:
        pictures = {number: picture(path) for number, path in paths[part].items()}
        generator = torch.Generator().manual_seed(0)
        asked = list(zip(*questions[part], strict=True))
        made = []
        for index in torch.randperm(len(asked), generator=generator).tolist()[:count]:
            text, answer, number = asked[index]
            read = text.rstrip("?").split() + ([answer] if masked else [])
            tokens = torch.full((longest,), PADDING)
            tokens[: 1 + len(read)] = torch.tensor([START, *(ids[word] for word in read)])
            row = {"input_ids": tokens, "attention_mask": tokens.ne(PADDING).long(), "pixel_values": pictures[number]}
            if masked:
                hidden = (torch.rand(longest, generator=generator) < 0.5) & (tokens > MASK)
                row |= {"input_ids": tokens.masked_fill(hidden, MASK), "labels": tokens.masked_fill(~hidden, -100)}
            else:
                row["labels"] = torch.nn.functional.one_hot(torch.tensor(answers.index(answer)), len(answers)).float()
            made.append(row)
        return made

    fields = {**ENCODER, "image_size": 64, "patch_size": 16, "vocab_size": MASK + 1 + len(words)}
    fields |= {"num_labels": len(answers), "max_position_embeddings": longest, "pad_token_id": PADDING}
    # with transformers' 0.02 the dense model still ignored its picture after 420 steps
    fields["initializer_range"] = WIDTH**-0.5
    model_class = mhmoe.MHMoEViltForMaskedLM if masked else mhmoe.MHMoEViltForQuestionAnswering
    return Task(
        train=rows("train"),
        test=rows("test", 1000),
        make=lambda moe: model_class(mhmoe.MHMoEViltConfig(**fields, **moe)),
        measure=perplexity if masked else accuracy,
        steps=180 if masked else 1800,
        batch=64,
        learning_rate=2e-3,
    )


def accuracy(predictions: Any) -> dict[str, float]:
    labels = predictions.label_ids
    labels = labels.argmax(-1) if labels.ndim > 1 else labels
    return {"accuracy": float((predictions.predictions.argmax(-1) == labels).mean())}


def blind_accuracy(task: Task) -> float:
    """Of the answer to each question that is the most frequent in training, whatever the picture."""
    answers = defaultdict(Counter)
    for row in task.train:
        answers[tuple(row["input_ids"].tolist())][int(row["labels"].argmax())] += 1
    right = [
        answers[tuple(row["input_ids"].tolist())].most_common(1)[0][0] == int(row["labels"].argmax())
        for row in task.test
    ]
    return statistics.mean(right)


def perplexity(predictions: Any) -> dict[str, float]:
    """Of the masked words."""
    logits, labels = torch.tensor(predictions.predictions), torch.tensor(predictions.label_ids)
    return {"perplexity": float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).exp())}


TASKS = {"digits": digits, "easy-vqa": easy_vqa, "easy-vqa-masked": partial(easy_vqa, masked=True)}


def run(name: str, task: Task, kind: str, seed: int) -> dict:
    set_seed(seed)
    model = task.make(models()[kind])
    model.set_experts_implementation(BACKEND)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=task.steps,
            per_device_train_batch_size=task.batch,
            per_device_eval_batch_size=500,
            learning_rate=task.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=task.steps // 10,
            weight_decay=0.05,
            adam_beta2=0.98,
            eval_strategy="steps",
            eval_steps=task.steps // 6,
            save_strategy="no",
            logging_steps=50,
            report_to=[],
            use_cpu=True,
            seed=seed,
        )
        trainer = Trainer(
            model, arguments, train_dataset=task.train, eval_dataset=task.test, compute_metrics=task.measure
        )
        seconds = trainer.train().metrics["train_runtime"]
    measure = task.measure.__name__
    evaluated = [entry for entry in trainer.state.log_history if f"eval_{measure}" in entry]
    curve = [[entry["step"], entry[f"eval_{measure}"]] for entry in evaluated]
    if (name, kind, seed) == ("digits", "MH-MoE", 0):
        draw_patches(model.eval(), task.test[0]["pixel_values"])
    counted = encoder_costs(model)
    return {
        "task": name,
        "model": kind,
        "seed": seed,
        measure: curve[-1][1],
        "curve": curve,
        "parameters": counted.parameters,
        "ffn_parameters": counted.ffn_parameters,
        "ffn_multiply_adds": counted.ffn_multiply_adds,
        "steps": task.steps,
        "batch": task.batch,
        "backend": BACKEND,
        "seconds": round(seconds),
        **machine(torch.device("cpu")),
    }


def draw_patches(model: torch.nn.Module, pixels: torch.Tensor) -> None:
    """P1's figure 1b, of one picture (1, height, width) of shades of grey."""
    picture = (pixels[0, :, :, None] / 2 + 0.5).expand(-1, -1, 3)
    save_patch_figure(PatchRouting(model, pixels[None]), picture, RESULTS.with_name("encoders_patches.png"))


def measure_of(row: dict) -> str:
    return next(measure.__name__ for measure in (accuracy, perplexity) if measure.__name__ in row)


def table(rows: list[dict]) -> str:
    lines = [
        "| task | model | FFN multiply-adds per token | parameters | steps | seeds | on test rows |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for task in TASKS:
        for kind in models():
            found = [row for row in rows if (row["task"], row["model"]) == (task, kind)]
            if found:
                measure = measure_of(found[0])
                scale, digits, unit = (100, 1, "%") if measure == "accuracy" else (1, 3, "")
                values = [scale * row[measure] for row in found]
                spread = f" ± {statistics.stdev(values):.{digits}f}" if len(found) > 1 else ""
                sizes = " | ".join(f"{found[0][name]:,}" for name in ("ffn_multiply_adds", "parameters", "steps"))
                mean = f"{measure} {statistics.mean(values):.{digits}f}{unit}{spread}"
                lines.append(f"| {task} | {kind} | {sizes} | {len(found)} | {mean} |")
    return "\n".join(lines)


def draw(rows: list[dict], file: Path) -> None:
    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    figure = Figure(figsize=(4.2 * len(tasks), 3.2), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        found = [row for row in rows if row["task"] == task]
        for number, kind in enumerate(models()):
            curves = [row["curve"] for row in found if row["model"] == kind]
            if not curves:
                continue
            steps = [step for step, _ in curves[0]]
            values = np.array([[value for _, value in curve] for curve in curves])
            axes.plot(steps, values.mean(0), label=kind, color=f"C{number}")
            axes.fill_between(steps, values.min(0), values.max(0), color=f"C{number}", alpha=0.2, linewidth=0)
        seeds = len({row["seed"] for row in found})
        title = f"mean and range of {seeds} seeds" if seeds > 1 else "one seed"
        axes.set_title(f"{task}: {title}", fontsize="medium")
        axes.set_xlabel("training steps")
        axes.set_ylabel(f"test {measure_of(found[0])}")
        axes.legend()
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=TASKS)
    parser.add_argument("--models", nargs="+", choices=models(), default=list(models()))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="only print the table, and draw")
    options = parser.parse_args()
    if (options.task is None) == (not options.table):
        parser.error("name a task, or give --table")
    rows = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    if options.task:
        task = TASKS[options.task]()
        if options.task == "easy-vqa":
            print(f"easy-vqa without the pictures: {blind_accuracy(task):.1%}")
        for seed in options.seeds:
            for kind in options.models:
                if not any((row["task"], row["model"], row["seed"]) == (options.task, kind, seed) for row in rows):
                    rows = merge(RESULTS, [run(options.task, task, kind, seed)], ("task", "model", "seed"))
    print(table(rows))
    draw(rows, RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()
