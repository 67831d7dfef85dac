"""The model card of a converted checkpoint, with the metadata that the Hub reads."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from . import markdown, sections


TEMPLATE = Path(__file__).parent / "converted.md"


def converted_card(
    report: dict[str, Any],
    inherited: dict[str, Any],
    *,
    promise: str,
    untrained: str,
    measured: str = "",
    auto_class: str = "AutoModelForCausalLM",
    pipeline_tag: str = "text-generation",
) -> str:
    """
    The text of README.md from a conversion's report. It has the section "status", which says that the model is not
    trained.

    Args:
        report: what `conversion.json` holds.
        inherited: metadata that the source's card goes on saying.
        promise: what the strategy promises.
        untrained: what the model is before any training.
        measured: what the strategy measured while it converted, in Markdown.
        auto_class: with which it loads.
        pipeline_tag: what it is for, in the Hub's words.
    """
    base_model = report["base_model"]
    data = ModelCardData(
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        pipeline_tag=pipeline_tag,
        library_name="transformers",
        tags=["mhmoe", "mh-moe", "mixture-of-experts", "moe", "upcycled", "custom_code"],
        **inherited,
    )
    name = base_model or report["source"]["name"]
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model_name=markdown.plain(f"{name.split('/')[-1]}-mhmoe"),
        # an id has no character that means something in Markdown
        made_from=f"[{name}](https://huggingface.co/{name})" if base_model and "/" in name else markdown.code(name),
        status=sections.section("status", f"**Not trained after conversion.** {untrained}"),
        promise=promise,
        measured=measured,
        auto_class=auto_class,
        writes_text=auto_class == "AutoModelForCausalLM",
        code=markdown.code,
        block=markdown.block,
        **{key: value for key, value in report.items() if key != "base_model"},
    )
    return str(card)
