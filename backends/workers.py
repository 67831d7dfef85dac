"""
Threads that each work on an expert of their own.

A product of one small expert's matrices is too little for several threads to share: they would spend their time
waiting for each other, and where another program holds a core, milliseconds at every product. So each thread takes a
whole expert, whose rows stay in that core's cache from the first product to the last, and then the next one left.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import torch


_pools: dict[int, ThreadPoolExecutor] = {}  # by number of threads
os.register_at_fork(after_in_child=_pools.clear)  # a fork has the pools, but not their threads


QUICK = 1 << 27  # multiply-adds that are done before other threads have woken up
READ = 16  # rows that take as long to multiply as their matrix takes to read


def run(make_task: Callable[[], Callable[[int], None]], costs: Sequence[int]) -> None:
    """
    Do tasks 0, 1, ..., of which none waits for another, of these `costs` (multiply-adds), in all of torch's threads:
    every task in one thread, or where that would leave threads idle every task in all. Little work is the caller's
    alone. Each thread calls `make_task` once, for a task with its own buffers.
    """
    threads, count = torch.get_num_threads(), len(costs)
    quick = parts(sum(costs)) == 1
    shared = max(costs, default=0) * threads > 1.5 * sum(costs)
    # a mode that watches operators (fake tensors, counters) sees those of the calling thread only
    if quick or shared or torch._C._len_torch_dispatch_stack():
        with _single_thread() if quick else nullcontext():
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

    for _ in _pool(threads).map(work, range(min(threads, count))):
        pass  # raises what a thread raised


def parts(cost: int) -> int:
    """Into how many tasks that much work should be divided, so that threads end at about the same time."""
    threads = torch.get_num_threads()
    return 1 if threads == 1 or (cost < QUICK and threads <= 4) else 4 * threads


@contextmanager
def _single_thread() -> Iterator[None]:
    """The caller alone does what torch does here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
