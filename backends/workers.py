"""
Threads that each work on an expert of their own.

A product of one small expert's matrices is too little for several threads to share: they would spend their time
waiting for each other, and where another program holds a core, milliseconds at every product. So each thread takes a
whole expert, whose rows stay in that core's cache from the first product to the last, and then the next one left.
"""

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


_pools: dict[int, ThreadPoolExecutor] = {}  # by number of threads
os.register_at_fork(after_in_child=_pools.clear)  # a fork has the pools, but not their threads


def run(make_task: Callable[[], Callable[[int], None]], count: int, most: int | None = None) -> None:
    """
    Do tasks 0 to `count` - 1, of which none waits for another, in `torch.get_num_threads()` threads, or `most`. Each
    of these calls `make_task` once, for a task with its own buffers. Where torch has one thread, the caller does them.
    """
    threads = min(torch.get_num_threads(), count, most or count)
    # a mode that watches operators (fake tensors, counters) sees those of the calling thread only
    if torch.get_num_threads() < 2 or torch._C._len_torch_dispatch_stack():
        task = make_task()
        for index in range(count):
            task(index)
        return
    inference = torch.is_inference_mode_enabled()
    queue = itertools.count()  # its `next` is one step of the interpreter, so that no task is given out twice

    def work(_: int) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            task = make_task()
            while (index := next(queue)) < count:
                task(index)

    for _ in _pool(torch.get_num_threads()).map(work, range(threads)):
        pass  # raises what a thread raised


def _pool(threads: int) -> ThreadPoolExecutor:
    if threads not in _pools:
        pool = ThreadPoolExecutor(threads, "mhmoe-experts", _be_single)
        for _ in pool.map(lambda _: None, range(threads)):
            pass
        torch.set_num_threads(threads)  # which `_be_single` changed for threads that start later
        _pools[threads] = pool
    return _pools[threads]


def _be_single() -> None:
    torch.get_num_threads()  # the first call in a thread takes the process's number, and undoes what was set before
    torch.set_num_threads(1)
