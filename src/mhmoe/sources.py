"""Where a model comes from: a folder, or the Hub. Only the files that are used are downloaded."""

import json
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .errors import UserError


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
LICENSE_FILES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")


def find_folder(source: str, revision: str | None = None, weights: bool = True) -> tuple[Path, str | None]:
    """
    The folder that holds `source`, downloaded first if it is on the Hub (if need be without its weights), and its id
    there (`None` for a folder).

    Raises:
        UserError: there is no such folder, and no such model within reach on the Hub.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder, id_of_cached_snapshot(folder)
    if folder.exists():
        raise UserError(f"{source}: a file, not a model folder; give the folder that holds config.json")
    try:
        folder = _download(source, revision, ["*.json", "README.md", *TOKENIZER_FILES, *LICENSE_FILES])
        if weights:
            commit = folder.name  # which names the folder; a branch may move meanwhile
            if not (_download(source, commit, [SAFE_WEIGHTS_NAME]) / SAFE_WEIGHTS_NAME).is_file():
                _download(source, commit, _shards(folder / SAFE_WEIGHTS_INDEX_NAME))
    except HFValidationError as error:
        raise UserError(f"{source}: no such folder, and not a model id of the Hub") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{source}: no such folder, and no such model within reach on the Hub") from error
    return folder, source


def id_of_cached_snapshot(folder: Path) -> str | None:
    """The id of the model whose snapshot in the Hub's cache `folder` is, `None` for any other folder."""
    # .../models--org--name/snapshots/COMMIT
    parts = folder.resolve().parts
    if len(parts) < 3 or parts[-2] != "snapshots" or not parts[-3].startswith("models--"):
        return None
    hub_id = "/".join(parts[-3].split("--")[1:])
    return hub_id if repo_folder_name(repo_id=hub_id, repo_type="model") == parts[-3] else None


def _download(hub_id: str, revision: str | None, patterns: list[str]) -> Path:
    """Files of the model's own folder, and chat templates: what other programs keep in folders is not taken."""
    # a pattern's * goes across folders
    others = [f"*/{pattern}" for pattern in patterns if "/" not in pattern]
    others += [f"{pattern}/*" for pattern in patterns if pattern.endswith("*")]
    return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=others))


def _shards(index_file: Path) -> list[str]:
    """The weight files that an index names, as patterns that fit nothing else."""
    try:
        names = set(json.loads(index_file.read_text(encoding="utf-8"))["weight_map"].values())
        return [re.sub(r"([*?[])", r"[\1]", name) for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a broken index is reported by who reads it
        return []
