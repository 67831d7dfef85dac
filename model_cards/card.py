"""The model card of a converted checkpoint, with the metadata that the Hub reads."""

import os
import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData


TEMPLATE = Path(__file__).parent / "converted.md"
PROMISES = {
    "exact": (
        "the logits equal the dense model's to the bit, in every floating-point type. The dense FFN is the shared "
        "expert and the merge layer is zero, so the routed path adds nothing until training moves it."
    ),
    "anchored": (
        "in float32 the logits are the dense model's up to rounding (at most 2e-4 apart), and so is greedy text. "
        "hidden_size / 2 neurons of each dense FFN are rows of the head layer, identity neurons of every expert and "
        "columns of the merge layer; the others are the shared expert. In bfloat16 "
        "rounding moves the logits as much as it moves the dense model's own; perplexity stays within 2%."
    ),
    "calibrated": (
        "the FFNs cost what the dense ones cost, within 1%; embeddings, attention and norms are the dense model's, "
        "to the bit. The logits are near the dense model's, not equal: perplexity, as `mhmoe verify` measures it, is "
        "at most 1.6 times the dense model's. `conversion.json` has each layer's error on text that was held out."
    ),
    "random": (
        "embeddings, attention and norms are the dense model's, to the bit. Nothing is promised of the logits: no "
        "part of the dense FFNs is in it."
    ),
}
STAGES = {
    "kept": "with the hottest neurons merely kept",
    "refitted": "after the ridge regression",
    "distilled": "after distillation",
}
UNTRAINED = {
    "exact": "It says what the dense model says; router and experts are random, and only training makes use of them.",
    "anchored": (
        "It says what the dense model says, with dense neurons at work in the experts; the experts differ only in "
        "neurons that add nothing yet, and routing makes no difference before training."
    ),
    "calibrated": (
        "It says nearly what the dense model says, at the same cost: a part of the dense neurons was dropped, and the "
        "others and the experts, half of whose neurons start free, have learnt their work from a short text."
    ),
    "random": (
        "Its FFNs are **untrained**: every MH-MoE layer is random, and the text that the model writes is noise. It is "
        "a place to start training from, and the baseline for other conversions."
    ),
}


def write_model_card(folder: Path, report: dict, source: Path) -> None:
    """
    Write `folder/README.md` from a conversion's report.

    Args:
        folder: the converted checkpoint.
        report: what `conversion.json` holds.
        source: the dense checkpoint's folder; its card gives license, language and the like.
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
        promise=PROMISES[report["strategy"]],
        untrained=UNTRAINED[report["strategy"]],
        STAGES=STAGES,
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
