"""Writing a sharded safetensors checkpoint tensor by tensor, so that no more than two tensors are in memory."""

import json
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from .checkpoint import BUFFER_DTYPES, DTYPES


SAFETENSORS_DTYPES = {dtype: name for name, dtype in (DTYPES | BUFFER_DTYPES).items()}
PART_SUFFIX = ".part"  # of a file that is not complete
PIECE = 2**24  # numbers that are cast and written at once


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
    """
    Write `shards` into an existing `folder`, with an index if there are several; call `on_written` with bytes.

    What an earlier call with the same plan left there is kept: a file has its name once it is safe on the disk, and
    until then `.part` behind it, in which the tensors lie one after the other.
    """
    for filename, names in shards.filename_to_tensors.items():
        if (folder / filename).exists():
            on_written(sum(tensors[name].nbytes for name in names))
        else:
            _write_shard(folder / filename, {name: tensors[name] for name in names}, on_written)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_shard(file: Path, tensors: dict[str, PlannedTensor], on_written: Callable[[int], object]) -> None:
    header = _encoded_header(tensors)
    part = file.with_name(file.name + PART_SUFFIX)
    with open(part, "a+b") as stream, ThreadPoolExecutor(1) as writer:
        stream.seek(0)
        end = len(header)
        if stream.read(end) != header:
            stream.truncate(0)
            stream.write(header)
            stream.flush()
        size, missing = part.stat().st_size, dict(tensors)
        for name, tensor in tensors.items():
            if end + tensor.nbytes > size:
                break
            end += tensor.nbytes
            on_written(missing.pop(name).nbytes)
        stream.truncate(end)  # and with it a tensor that was cut off

        # One tensor is on its way to the disk while the next one is made.
        on_its_way = None
        for tensor in missing.values():
            data = tensor.load().contiguous()
            assert data.shape == tensor.shape
            if on_its_way:
                on_written(on_its_way.result())
            on_its_way = writer.submit(_write_tensor, stream, data, tensor.dtype)
            del data
        if on_its_way:
            on_written(on_its_way.result())
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(file)


def _encoded_header(tensors: dict[str, PlannedTensor]) -> bytes:
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data must start at a multiple of 8 bytes
    return struct.pack("<Q", len(encoded)) + encoded


def _write_tensor(stream: BinaryIO, data: torch.Tensor, dtype: torch.dtype) -> int:
    for piece in data.detach().view(-1).split(PIECE):  # so that a cast copies one piece at a time
        stream.write(piece.to(dtype).view(torch.uint8).numpy())
    return data.numel() * dtype.itemsize
