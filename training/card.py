"""What fine-tuning adds to a model's card."""

import re
from pathlib import Path


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
