"""Stand-in for the `distributed_testing_utils` of transformers' tests: one CPU process per rank, joined by gloo."""

import functools
import multiprocessing
import os
from collections.abc import Callable
from datetime import timedelta

import torch
from torch import distributed


# Ranks are forked from a server that has these imported, which saves every rank some seconds.
multiprocessing.set_forkserver_preload(["mhmoe", f"{__package__}.test_expert_parallel_mixin"])


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_distributed_backend() -> str:
    return "gloo"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    """A rank on the CPU has no device to choose."""


def _start_rank_processes(function: Callable, args: tuple, nprocs: int) -> None:
    """Run `function(rank, *args)` in `nprocs` processes; what one of them raises is raised here."""
    torch.multiprocessing.start_processes(function, args=args, nprocs=nprocs, start_method="forkserver")


def run_distributed(world_size: int) -> Callable:
    """`run_distributed(2)(function)(*args)` runs `function(rank, *args)` in a process group of 2."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*args):
            store = distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
            _start_rank_processes(_run_rank, (world_size, store.host, store.port, function, args), world_size)

        return run

    return decorate


def _run_rank(rank: int, world_size: int, host: str, port: int, function: Callable, args: tuple) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR=host, MASTER_PORT=str(port)
    )
    store = distributed.TCPStore(host, port, is_master=False)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(minutes=2))
    try:
        function(rank, *args)
    finally:
        distributed.destroy_process_group()
