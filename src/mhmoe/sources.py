"""Where a model comes from: a folder, or the Hub. Only the files that are used are downloaded."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from transformers.utils import ADAPTER_CONFIG_NAME

from .errors import UserError
from .intake import INDEX, LICENSE_FILES, TOKENIZER_FILES, WEIGHTS, check_folder, check_index, read_json


def find_folder(
    source: str, revision: str | None = None, weights: bool = True, code: bool = False
) -> tuple[Path, str | None]:
    """
    The folder that holds `source`, downloaded first if it is on the Hub, and its id there (`None` for a folder). What
    is in it has passed the gate (`mhmoe.intake`).

    Args:
        source: a folder, or an id on the Hub.
        revision: branch, tag or commit on the Hub.
        weights: whether they are downloaded too.
        code: whether Python files are.

    Raises:
        UserError: there is no such folder, and no such model within reach on the Hub; or a file in it cannot be right.
    """
    folder = Path(source)
    try:
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, ValueError) as error:  # a name that no system allows
        raise UserError(f"{source[:60]!r}: is no name of a folder or of a model on the Hub") from error
    if is_folder:
        if revision is not None:
            raise UserError(f"revision={revision!r}: {source} is a folder, which has no revisions; leave it out")
        check_folder(folder)
        return folder, id_of_cached_snapshot(folder)
    if exists:
        raise UserError(f"{source}: a file, not a model folder; give the folder that holds config.json")
    try:
        folder = _download(
            source, revision, ["*.json", "README.md", *TOKENIZER_FILES, *LICENSE_FILES, *["*.py"] * code]
        )
        if weights:
            commit = folder.name if folder.parent.name == "snapshots" else revision  # a branch may move meanwhile
            if not (_download(source, commit, [WEIGHTS]) / WEIGHTS).is_file():
                _download(source, commit, _shards(folder / INDEX))
    except HFValidationError as error:
        raise UserError(f"{source}: no such folder, and not a model id of the Hub") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{source}: no such folder, and no such model within reach on the Hub") from error
    check_folder(folder)
    return folder, source


def refuse_adapter(folder: Path) -> None:
    """Raise a [`UserError`] where an adapter lies beside the weights, which are not the model without it."""
    if (folder / ADAPTER_CONFIG_NAME).exists():
        raise UserError(
            f"{folder / ADAPTER_CONFIG_NAME}: an adapter; merge it first (PeftModel.merge_and_unload()) and save the "
            "model, or move it away if the weights already hold it"
        )


def id_of_cached_snapshot(folder: Path) -> str | None:
    """The id of the model whose snapshot in the Hub's cache `folder` is, `None` for any other folder."""
    # .../models--org--name/snapshots/COMMIT
    parts = folder.resolve().parts
    if len(parts) < 3 or parts[-2] != "snapshots" or not parts[-3].startswith("models--"):
        return None
    hub_id = "/".join(parts[-3].split("--")[1:])
    try:
        return hub_id if repo_folder_name(repo_id=hub_id, repo_type="model") == parts[-3] else None
    except HFValidationError:  # a folder that is named so and is none of the cache
        return None


def _download(hub_id: str, revision: str | None, patterns: list[str]) -> Path:
    """Files of the model's own folder, and chat templates: what other programs keep in folders is not taken."""
    # a * of these patterns goes across folders
    others = [f"*/{pattern}" for pattern in patterns if "/" not in pattern]
    others += [f"{pattern}/*" for pattern in patterns if pattern.endswith("*")]
    return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=others))


def _shards(index_file: Path) -> list[str]:
    """The weight files that an index names, as patterns that fit nothing else; none where there is no index."""
    if not index_file.is_file():
        return []
    index = read_json(index_file)
    check_index(index_file, index)
    return [re.sub(r"([*?[])", r"[\1]", name) for name in sorted(set(index["weight_map"].values()))]
