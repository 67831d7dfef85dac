"""Conversions that are killed."""

import multiprocessing
import os
import signal
from pathlib import Path
from threading import RLock

import torch
from tqdm import tqdm

from mhmoe.conversion import convert, writer


SMALL = {"num_moe_heads": 4, "num_experts": 6, "moe_intermediate_size": 8, "max_shard_size": "80KB"}


def in_child(work, *arguments, **options) -> int:
    """Exit code of `work(*arguments, **options)` in a process of its own; it is negative if a signal ended it."""

    def main():
        torch.set_num_threads(1)  # the pool of the parent's threads does not survive the fork
        tqdm.set_lock(RLock())  # its own is one semaphore of all forks, which one that is killed may hold forever
        work(*arguments, **options)

    child = multiprocessing.get_context("fork").Process(target=main)
    child.start()
    child.join()
    return child.exitcode


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def convert_and_die_inside_tensor(number: int, dense: Path, output: Path, **options) -> None:
    """Convert; be killed when half of the `number`th tensor (from 1) is in the file."""
    written, write = 0, writer._write_tensor

    def write_half(stream, data, dtype):
        nonlocal written
        written += 1
        if written == number:
            half = data.to(dtype).view(-1)[: data.numel() // 2]
            stream.write(half.view(torch.uint8).numpy())
            stream.flush()
            die()
        return write(stream, data, dtype)

    writer._write_tensor = write_half
    convert(dense, output, **SMALL, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
