"""Where a model comes from: a folder, or the Hub. Only the files that are used are downloaded."""

import json
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .errors import UserError
from .intake import TOKENIZER_FILES, check_folder


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
        if revision is not None:
            raise UserError(f"revision={revision!r}: {source} is a folder, which has no revisions; leave it out")
        check_folder(folder)
        return folder, id_of_cached_snapshot(folder)
    if folder.exists():
        raise UserError(f"{source}: a file, not a model folder; give the folder that holds config.json")
    try:
        patterns = ["*.json", "README.md", *TOKENIZER_FILES, *LICENSE_FILES]
        # a pattern's * matches folders too, in which some models keep another format
        folder = Path(
            snapshot_download(source, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*.json"])
        )
        if weights:  # of the same commit, which names the folder
            snapshot_download(source, revision=folder.name, allow_patterns=_weight_files(folder))
    except HFValidationError as error:
        raise UserError(f"{source}: no such folder, and not a model id of the Hub") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{source}: no such folder, and no such model within reach on the Hub") from error
    check_folder(folder)
    return folder, source


def id_of_cached_snapshot(folder: Path) -> str | None:
    """The id of the model whose snapshot in the Hub's cache `folder` is, `None` for any other folder."""
    # .../models--org--name/snapshots/COMMIT
    parts = folder.resolve().parts
    if len(parts) < 3 or parts[-2] != "snapshots" or not parts[-3].startswith("models--"):
        return None
    hub_id = "/".join(parts[-3].split("--")[1:])
    return hub_id if repo_folder_name(repo_id=hub_id, repo_type="model") == parts[-3] else None


def _weight_files(folder: Path) -> list[str]:
    """The files that the index names; without one, the file of a model that is in one."""
    try:
        weight_map = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
        return sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a broken index is reported by who reads it
        return [SAFE_WEIGHTS_NAME]
