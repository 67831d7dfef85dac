"""The model card of a converted checkpoint, with the metadata that the Hub reads."""

import os
import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData


TEMPLATE = Path(__file__).parent / "converted.md"


def write_model_card(
    folder: Path, report: dict, source: Path, *, promise: str, untrained: str, measured: str = ""
) -> None:
    """
    Write `folder/README.md` from a conversion's report.

    Args:
        folder: the converted checkpoint.
        report: what `conversion.json` holds.
        source: the dense checkpoint's folder; its card gives license, language and the like.
        promise: what the strategy promises.
        untrained: what the model is before any training.
        measured: what the strategy measured while it converted, in Markdown.
    """
    data = ModelCardData(
        base_model=report["base_model"],
        base_model_relation="finetune",
        pipeline_tag="text-generation",
        library_name="transformers",
        tags=["mhmoe", "mh-moe", "mixture-of-experts", "moe", "upcycled", "custom_code"],
        **_inherited_metadata(source),
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        promise=promise,
        untrained=untrained,
        measured=measured,
        model_name=f"{report['base_model'].split('/')[-1]}-mhmoe",
        **report,
    )
    card.save(folder / "README.md")


def put_section(folder: Path, title: str, text: str) -> None:
    """Write the section "## TITLE" of `folder/README.md`: in place of one with that title, or else at the end."""
    file = folder / "README.md"
    card = file.read_text(encoding="utf-8")
    section = f"## {title}\n\n{text.strip()}\n"
    old = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    if match := old.search(card):
        after = card[match.end() :]
        card = card[: match.start()] + section + ("\n" + after if after else "")
    else:
        card = f"{card.rstrip()}\n\n{section}"
    unfinished = file.with_name(".README.md.tmp")
    unfinished.write_text(card, encoding="utf-8")
    os.replace(unfinished, file)


def _inherited_metadata(source: Path) -> dict:
    """The source card's license and language, where it has a card that names them."""
    try:
        metadata = ModelCard.load(source / "README.md", ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError):
        return {}
    return {key: metadata[key] for key in ("license", "license_name", "license_link", "language") if key in metadata}
