"""What the card of a source model says that its successor's card goes on saying."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from mhmoe.errors import UserError, one_line
from mhmoe.intake import check_file


INHERITED = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True)
class SourceCard:
    """
    Attributes:
        inherited: license and language, where the card names them.
        hub_id: of the model on the Hub, or of the one that it was made from; `None` if the card names none.
    """

    inherited: dict[str, str | list[str]]
    hub_id: str | None


def read_source_card(file: Path) -> SourceCard:
    """
    The card in `file`; an empty one where there is none.

    Raises:
        UserError: it cannot be read, or its metadata is no YAML that the Hub would take.
    """
    if not os.path.lexists(file):
        return SourceCard({}, None)
    check_file(file, file.parent)
    try:
        metadata = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict()
    except Exception as error:  # of reading, of YAML and of the Hub's validation, each with several kinds
        raise UserError(f"{file}: its metadata cannot be read ({one_line(error)[:200]})") from error
    metadata["language"] = _languages(metadata.get("language"))
    inherited = {key: metadata[key] for key in INHERITED if _is_text(metadata.get(key))}
    named = [metadata.get("model_id"), metadata.get("model_name"), metadata.get("base_model")]
    ids = [name for entry in named for name in (entry if isinstance(entry, list) else [entry])]
    # a name with an owner is the Hub's; one without may be anything
    return SourceCard(inherited, next((name for name in ids if is_hub_id(name) and "/" in name), None))


def is_hub_id(name: Any) -> TypeGuard[str]:
    """Whether a model on the Hub could have this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return isinstance(name, str)


def _languages(value: Any) -> Any:
    """With Norwegian's code, `no`, which this YAML reads as `False`."""
    if isinstance(value, list):
        return [_languages(entry) for entry in value]
    return "no" if value is False else value


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)
    )
