"""A dense checkpoint as it lies on disk: its config and, lazily, its tensors."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from mhmoe.errors import UserError, one_line

from .families import read_config


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
PICKLE_FILES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, and what its file's header says of it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # in safetensors' spelling: F32, BF16, ...


class DenseCheckpoint:
    """
    A Llama checkpoint in safetensors. Opening it reads the config and the headers, no weights.

    Args:
        source: folder, or model id on the Hub.
        revision: branch, tag or commit on the Hub.

    Raises:
        UserError: there is no such folder or model, a file is missing or broken, the architecture is another.
    """

    def __init__(self, source: str | Path, revision: str | None = None):
        self.folder, self.hub_id = find_folder(str(source), revision)
        self.config = self._read_config()
        self._open_files: dict[Path, safe_open] = {}
        self.tensors = self._read_headers()

    @property
    def name(self) -> str:
        """The id on the Hub, or the folder's name."""
        return self.hub_id or self.folder.resolve().name

    @property
    def weight_files(self) -> list[Path]:
        return sorted({tensor.file for tensor in self.tensors.values()})

    def load(self, name: str) -> torch.Tensor:
        """The tensor `name`, as stored, on the CPU."""
        file = self.tensors[name].file
        try:
            return self._open(file).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: cannot read tensor {name} ({one_line(error)}); get the file again") from error

    def sha256(self) -> dict[str, str]:
        """Hash of every weight file and of the config, by file name."""
        hashes = {}
        for file in [self.folder / CONFIG_NAME, *self.weight_files]:
            with open(file, "rb") as stream:
                hashes[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
        return hashes

    def files(self, patterns: tuple[str, ...]) -> list[Path]:
        """The files of the checkpoint that match one of `patterns`, relative to its folder."""
        found = {path for pattern in patterns for path in self.folder.glob(pattern) if path.is_file()}
        return sorted(path.relative_to(self.folder) for path in found)

    def _read_config(self) -> PreTrainedConfig:
        file = self.folder / CONFIG_NAME
        return read_config(file, read_json(file, f"is there a model in {self.folder}?"))

    def _read_headers(self) -> dict[str, StoredTensor]:
        index_file = self.folder / SAFE_WEIGHTS_INDEX_NAME
        if (self.folder / SAFE_WEIGHTS_NAME).is_file():
            return self._read_header(self.folder / SAFE_WEIGHTS_NAME)
        if not index_file.is_file():
            if pickles := self.files(PICKLE_FILES):
                raise UserError(
                    f"{self.folder / pickles[0]}: pickled weights can run code and are not read; save the model as "
                    "safetensors (AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)) and convert that"
                )
            raise UserError(f"{self.folder}: no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}; get the weights")
        weight_map = read_json(index_file).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{index_file}: weight_map is missing or is not a map of names to files; get it again")
        shards = sorted(set(weight_map.values()))
        if missing := [shard for shard in shards if not (self.folder / shard).is_file()]:
            raise UserError(
                f"{self.folder / missing[0]}: named in {SAFE_WEIGHTS_INDEX_NAME} but missing; get the file"
            )
        tensors = {}
        for shard in shards:
            tensors.update(self._read_header(self.folder / shard))
        if missing := sorted(weight_map.keys() - tensors.keys()):
            raise UserError(
                f"{self.folder / weight_map[missing[0]]}: lacks tensor {missing[0]} that the index promises"
            )
        return {name: tensors[name] for name in weight_map}

    def _read_header(self, file: Path) -> dict[str, StoredTensor]:
        try:
            opened = self._open(file)
            return {name: StoredTensor(file, *_shape_and_dtype(opened, name)) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: truncated or not safetensors ({one_line(error)}); get the file again") from error

    def _open(self, file: Path) -> safe_open:
        if file not in self._open_files:
            self._open_files[file] = safe_open(file, framework="pt")
        return self._open_files[file]


def find_folder(source: str, revision: str | None = None) -> tuple[Path, str | None]:
    """The folder that holds `source`, downloaded first if it is on the Hub, and its id there (`None` for a folder)."""
    folder = Path(source)
    if folder.is_dir():
        return folder, _id_of_cached_snapshot(folder)
    if folder.exists():
        raise UserError(f"{source}: a file, not a model folder; give the folder that holds config.json")
    try:
        patterns = ["*.json", "*.safetensors", "README.md", *TOKENIZER_FILES, *LICENSE_FILES]
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns)), source
    except HFValidationError as error:
        raise UserError(f"{source}: no such folder, and not a model id of the Hub") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{source}: no such folder, and no such model within reach on the Hub") from error


def read_json(file: Path, hint: str = "get the file again") -> dict:
    """The JSON object in `file`; a [`UserError`] with `hint` if it is missing or is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file; {hint}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({one_line(error)}); {hint}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: holds no JSON object; {hint}")
    return value


def _id_of_cached_snapshot(folder: Path) -> str | None:
    # .../models--org--name/snapshots/COMMIT in the Hub's cache
    parts = folder.resolve().parts
    if len(parts) < 3 or parts[-2] != "snapshots" or not parts[-3].startswith("models--"):
        return None
    hub_id = "/".join(parts[-3].split("--")[1:])
    return hub_id if repo_folder_name(repo_id=hub_id, repo_type="model") == parts[-3] else None


def _shape_and_dtype(opened: safe_open, name: str) -> tuple[tuple[int, ...], str]:
    stored = opened.get_slice(name)
    return tuple(stored.get_shape()), stored.get_dtype()
