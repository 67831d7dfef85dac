"""A dense checkpoint as it lies on disk: its config and, lazily, its tensors."""

import copy
import hashlib
import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import get_safetensors_metadata
from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from mhmoe.errors import UserError, one_line
from mhmoe.intake import LICENSE_FILES, TOKENIZER_FILES, check_index, own_files, read_json
from mhmoe.sources import find_folder, refuse_adapter

from .families import FAMILIES, read_config
from .layouts import on_meta


TOKENIZER_ITSELF = ("tokenizer*", "vocab.json")  # without these there may be templates, but no tokenizer
PICKLE_FILES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# of buffers that some encoders have, such as the steps that a batch norm counts
BUFFER_DTYPES = {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
HASH_BLOCK = 4 * 2**20  # bytes


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, and what its file's header says of it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # in safetensors' spelling: F32, BF16, ...
    offset: int  # of the first byte, in the file


class DenseCheckpoint:
    """
    A dense checkpoint in safetensors, of one of the families in `conversion/families.py`. Opening it reads the config
    and the headers, no weights.

    Args:
        source: folder, or model id on the Hub.
        revision: branch, tag or commit on the Hub.
        weights: whether tensors will be loaded. Without them, a model on the Hub is not downloaded, only its headers;
            and a folder may hold the config alone, which then says what tensors there would be.
        code: whether Python files are downloaded too, which a tokenizer may need.

    Raises:
        UserError: there is no such folder or model, a file is missing or broken, the architecture is another.
    """

    def __init__(self, source: str | Path, revision: str | None = None, weights: bool = True, code: bool = False):
        self.source = source
        self.folder, self.hub_id = find_folder(str(source), revision, weights=False, code=code)
        refuse_adapter(self.folder)  # before weights are fetched
        if weights:
            find_folder(str(source), revision)
        self.config = self._read_config()
        local = weights or Path(source).is_dir()
        stored = ("*.safetensors", SAFE_WEIGHTS_INDEX_NAME, *PICKLE_FILES)
        self.config_alone = not weights and local and not self.files(stored)
        if self.config_alone:
            self.tensors = self._described_by_config()
        else:
            self.tensors = self._read_headers() if local else self._fetch_headers(revision)
        if not self.tensors:
            raise UserError(f"{source}: its weight files hold no tensors; get them again")

    @property
    def name(self) -> str:
        """The id on the Hub, or the folder's name."""
        return self.hub_id or self.folder.resolve().name

    @property
    def weight_files(self) -> list[Path]:
        return [] if self.config_alone else sorted({tensor.file for tensor in self.tensors.values()})

    def load(self, name: str) -> torch.Tensor:
        """The tensor `name`, as stored, on the CPU."""
        # Read, not mapped: mapped pages stay in this process's memory, and a file that shrinks would kill it.
        stored = self.tensors[name]
        tensor = torch.empty(stored.shape, dtype=(DTYPES | BUFFER_DTYPES)[stored.dtype])
        rest = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        try:
            with open(stored.file, "rb", buffering=0) as stream:
                stream.seek(stored.offset)
                while rest:
                    if not (count := stream.readinto(rest)):
                        raise UserError(f"{stored.file}: ends inside tensor {name}; get the file again")
                    rest = rest[count:]
        except OSError as error:
            raise UserError(f"{stored.file}: cannot read tensor {name} ({error.strerror}); get it again") from error
        return tensor

    @contextmanager
    def hashing(self) -> Generator["FileHashes"]:
        """Hash every weight file and the config in a thread, for as long as the block runs."""
        first_used = dict.fromkeys(tensor.file for tensor in self.tensors.values())
        hashes = FileHashes([self.folder / CONFIG_NAME, *first_used])
        try:
            yield hashes
        finally:
            hashes.stop()

    def sha256(self) -> dict[str, str]:
        """Hash of every weight file and of the config, by file name."""
        with self.hashing() as hashes:
            return hashes.result()

    def stamp(self) -> dict[str, list[int]]:
        """Size and time of change (ns) of everything that a conversion reads, by file name."""
        names = self.files(("*.json", "README.md", *TOKENIZER_FILES, *LICENSE_FILES, "LICENSES/*"))
        names += [file.relative_to(self.folder) for file in self.weight_files]
        stats = {str(name): (self.folder / name).stat() for name in sorted(names)}
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}

    def files(self, patterns: tuple[str, ...]) -> list[Path]:
        """The checkpoint's own files that match one of `patterns`, relative to its folder."""
        return own_files(self.folder, patterns)

    def _read_config(self) -> PreTrainedConfig:
        file = self.folder / CONFIG_NAME
        config = read_config(file, read_json(file, f"is there a model in {self.folder}?"))
        if config.model_type in FAMILIES:
            first_layer = copy.deepcopy(config)
            first_layer.num_hidden_layers = min(1, config.num_hidden_layers)
            first_layer.dtype = torch.float32  # whether its own is converted is asked elsewhere
            try:
                on_meta(first_layer)  # a model that transformers cannot load is not converted
            except UserError as error:
                raise UserError(f"{file}: {error}") from error
        return config

    def _described_by_config(self) -> dict[str, StoredTensor]:
        dtype = str(self.config.dtype or torch.float32).removeprefix("torch.")
        names = {str(known).removeprefix("torch."): name for name, known in DTYPES.items()}
        if dtype not in names:
            file = self.folder / CONFIG_NAME
            raise UserError(f"{file}: dtype={dtype} is not converted; give one of {', '.join(names)}")
        model = on_meta(self.config)
        return {
            name: StoredTensor(self.folder / SAFE_WEIGHTS_NAME, tuple(parameter.shape), names[dtype], 0)
            for name, parameter in model.named_parameters()
        }

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
        index = read_json(index_file)
        check_index(index_file, index)
        if not isinstance(metadata := index.get("metadata"), dict):  # without, transformers does not load the model
            raise UserError(f"{index_file}: metadata={one_line(metadata)} must be an object; add an empty one")
        shards = sorted(set(index["weight_map"].values()))
        if missing := [shard for shard in shards if not (self.folder / shard).is_file()]:
            raise UserError(
                f"{self.folder / missing[0]}: named in {SAFE_WEIGHTS_INDEX_NAME} but missing; get the file"
            )
        tensors = {}
        for shard in shards:
            tensors.update(self._read_header(self.folder / shard))
        return tensors  # all that the shards hold, as transformers takes them, whatever the index says of them

    def _read_header(self, file: Path) -> dict[str, StoredTensor]:
        try:
            with safe_open(file, framework="pt"):  # which checks sizes and offsets against the file
                pass
            with open(file, "rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(length))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: truncated or not safetensors ({one_line(error)}); get the file again") from error
        return {
            name: StoredTensor(file, tuple(entry["shape"]), entry["dtype"], 8 + length + entry["data_offsets"][0])
            for name, entry in sorted(header.items())
            if name != "__metadata__"
        }

    def _fetch_headers(self, revision: str | None) -> dict[str, StoredTensor]:
        assert self.hub_id is not None  # for there is no such folder
        try:
            files = get_safetensors_metadata(self.hub_id, revision=revision).files_metadata
        except NotASafetensorsRepoError as error:
            raise UserError(f"{self.hub_id}: has no weights in safetensors; choose a model that has") from error
        except (SafetensorsParsingError, HfHubHTTPError, OSError) as error:
            raise UserError(f"{self.hub_id}: headers cannot be read from the Hub ({one_line(error)})") from error
        return {
            name: StoredTensor(self.folder / file, tuple(tensor.shape), tensor.dtype, tensor.data_offsets[0])
            for file, metadata in files.items()
            for name, tensor in metadata.tensors.items()
        }


class FileHashes:
    """SHA-256 of files, computed in a thread of its own."""

    def __init__(self, files: list[Path]):
        self._hashes: dict[str, str] = {}
        self._error: OSError | None = None
        self._stopped = False
        # a daemon: a program that fails meanwhile need not wait for it
        self._thread = threading.Thread(target=self._run, args=(files,), daemon=True)
        self._thread.start()

    def result(self) -> dict[str, str]:
        """The hashes by file name, once they are all there."""
        self._thread.join()
        if self._error is not None:
            raise UserError(f"{self._error.filename}: cannot be read ({self._error.strerror})") from self._error
        return dict(sorted(self._hashes.items()))

    def stop(self) -> None:
        """Give up what is not hashed yet."""
        self._stopped = True
        self._thread.join()

    def _run(self, files: list[Path]) -> None:
        block = bytearray(HASH_BLOCK)
        for file in files:
            digest = hashlib.sha256()
            try:
                with open(file, "rb", buffering=0) as stream:
                    while (count := stream.readinto(block)) and not self._stopped:
                        digest.update(memoryview(block)[:count])
            except OSError as error:
                self._error = error
                error.filename = error.filename or str(file)
                return
            self._hashes[file.name] = digest.hexdigest()
