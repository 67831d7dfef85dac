"""What training adds to a model's card."""

import re
from pathlib import Path

from huggingface_hub import ModelCardData


NOT_TRAINED = re.compile(r"\*\*Not trained after conversion\.\*\*.*?(?=\n\n|\Z)", re.DOTALL)
TRAINED = "**Trained after conversion**, see Training below: what this card promises of the conversion held before it."


def write_trained_card(source: Path, output: Path, training: list[str]) -> None:
    """
    Write `output/README.md`: the card of the model that training started from, with a section on the training.

    Args:
        source: the card of that model; without one nothing is written.
        output: the folder of the trained model.
        training: lines of Markdown, the section.
    """
    if not source.is_file():
        return
    text = NOT_TRAINED.sub(TRAINED, source.read_text(encoding="utf-8")).rstrip("\n")
    section = "\n".join(["## Training", "", *training])
    (output / "README.md").write_text(f"{text}\n\n{section}\n", encoding="utf-8")


def write_pretrained_card(output: Path, figures: dict) -> None:
    """
    Write `output/README.md` for a model trained from random weights.

    Args:
        output: the folder of the model.
        figures: what `pretraining.json` holds.
    """
    data = ModelCardData(
        pipeline_tag="text-generation",
        library_name="transformers",
        tags=["mhmoe", "mixture-of-experts", "moe", "custom_code"] if figures["model_type"] == "mhmoe" else None,
    )
    tokens, perplexity = figures["curve"][-1]["tokens"], figures["curve"][-1]["perplexity"]
    lines = [
        f"# {output.resolve().name}",
        "",
        f"Trained from random weights with `mhmoe pretrain` on {tokens:,} tokens: {figures['model']}"
        + (f" with {figures['config_overrides']}" if figures["config_overrides"] else "")
        + f", seed {figures['seed']}.",
        "",
        f"Perplexity on {figures['validation_tokens']:,} tokens of validation text: {perplexity:.3f}. Parameters: "
        f"{figures['parameters']:,}.",
    ]
    (output / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n" + "\n".join(lines) + "\n", encoding="utf-8")
