"""Writing a sharded safetensors checkpoint tensor by tensor, so that no more than one tensor is in memory."""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME


SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to write: its form, and how to get it when its turn comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def plan_shards(tensors: dict[str, PlannedTensor], max_shard_size: int | str) -> StateDictSplit:
    """
    Which tensor goes into which file, named and split as the Hub's libraries do.

    Raises:
        ValueError: `max_shard_size` (bytes, or as "5GB") is no positive size.
    """
    if isinstance(max_shard_size, int) and max_shard_size <= 0:
        raise ValueError(max_shard_size)
    return split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )


def write_shards(
    folder: Path, shards: StateDictSplit, tensors: dict[str, PlannedTensor], on_written: Callable[[int], object]
) -> None:
    """Write `shards` into an existing `folder`, with an index if there are several; call `on_written` with bytes."""
    for filename, names in shards.filename_to_tensors.items():
        _write_shard(folder / filename, {name: tensors[name] for name in names}, on_written)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_shard(file: Path, tensors: dict[str, PlannedTensor], on_written: Callable[[int], object]) -> None:
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data must start at a multiple of 8 bytes
    with open(file, "wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors.values():
            data = tensor.load().to(tensor.dtype).contiguous()
            assert data.shape == tensor.shape
            stream.write(data.view(-1).view(torch.uint8).numpy())
            on_written(tensor.nbytes)
