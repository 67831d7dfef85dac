"""What `mhmoe train` is given in tests, and what it leaves behind."""

import json
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "us", "while", "rain", "fell", "outside"]


def documents(number: int, words: int = 40) -> list[str]:
    generator = random.Random(0)
    return [" ".join(generator.choices(WORDS, k=words)) for _ in range(number)]


def write_jsonl(path: Path, texts: list[str], column: str = "text") -> Path:
    rows = [json.dumps({"id": number, column: text}, ensure_ascii=False) for number, text in enumerate(texts)]
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def options(*arguments: str, **flags) -> list[str]:
    """What follows `mhmoe train` for a few steps; flags are added or replace these, None leaves one out."""
    defaults = {
        "train_file": "train.jsonl",
        "validation_file": "validation.txt",
        "output_dir": "output",
        "block_size": 64,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    given = {name: value for name, value in {**defaults, **flags}.items() if value is not None}
    return ["model", *arguments, *(part for name, value in given.items() for part in (f"--{name}", str(value)))]


def logs_of(folder: str) -> list[dict]:
    return json.loads(Path(folder, "trainer_state.json").read_text())["log_history"]


def weights_of(folder: str) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()
