"""What training adds to a model's card."""

import logging
import os
import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from mhmoe.errors import one_line
from mhmoe.files import write_text
from mhmoe.intake import check_file
from mhmoe.model_cards import markdown, sections


STATUS, TRAINING = "status", "training"  # sections of a card
# the status of a card that was written before sections had marks
UNMARKED_STATUS = re.compile(r"\*\*Not trained after conversion\.\*\*.*?(?=\n\n|\Z)", re.DOTALL)
TRAINED = "**Trained after conversion**, see Training below: what this card promises of the conversion held before it."

logger = logging.getLogger(__name__)


def write_trained_card(source: Path, output: Path, training: list[str]) -> None:
    """
    Write `output/README.md`: the card of the model that training started from, with a section on the training.

    Args:
        source: the card of that model; without one nothing is written.
        output: the folder of the trained model.
        training: lines of Markdown, the section.

    Raises:
        UserError: that card is no file of its folder.
        UnicodeDecodeError: it is not UTF-8.
    """
    if not os.path.lexists(source):
        return
    check_file(source, source.parent)
    text = source.read_text(encoding="utf-8")
    if sections.find(text, STATUS) is not None:
        text = sections.replace(text, STATUS, TRAINED)
    else:
        text = UNMARKED_STATUS.sub(sections.section(STATUS, TRAINED), text)
    # of a model that was trained before, both are told
    before = sections.find(text, TRAINING) or "## Training"
    text = sections.replace(text, TRAINING, "\n".join([before, "", *training]))
    write_text(output / "README.md", text)
    if not text.startswith("---"):  # it has no metadata
        return
    try:
        ModelCard.load(output / "README.md")
    except Exception as error:  # of the YAML parser and of huggingface_hub's validation
        logger.warning(
            "%s: its metadata, which is that of %s, cannot be read, and the Hub would refuse it (%s)",
            output / "README.md",
            source,
            one_line(error),
        )


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
    overrides = f" with {markdown.code(figures['config_overrides'])}" if figures["config_overrides"] else ""
    training = [
        f"Trained from random weights with `mhmoe pretrain` on {tokens:,} tokens: "
        f"{markdown.code(figures['model'])}{overrides}, seed {figures['seed']}.",
        "",
        f"Perplexity on {figures['validation_tokens']:,} tokens of validation text: {perplexity:.3f}. Parameters: "
        f"{figures['parameters']:,}.",
    ]
    card = ["---", data.to_yaml(), "---", f"# {markdown.plain(output.resolve().name)}", "", "\n".join(training)]
    write_text(output / "README.md", "\n".join(card) + "\n")
