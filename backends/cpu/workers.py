"""
Threads that each work on an expert of their own.

A product of one small expert's matrices is too little for several threads to share: they would spend their time
waiting for each other. So each thread takes a whole expert, whose rows stay in that core's cache from the first
product to the last, and then the next one left.

The threads are torch's own OpenMP team. Others would have to share the cores with it, since its threads do not let go
of a core for milliseconds after each of torch's operators.
"""

import ctypes
import heapq
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .tuning import QUICK_MULTIPLY_ADDS


_Region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _openmp() -> ctypes.CDLL | None:
    """The OpenMP library that torch is linked with, if it has the entry points of GCC's."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        library.GOMP_parallel.argtypes = [_Region, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        library.GOMP_parallel.restype = None
        library.omp_set_num_threads.argtypes = [ctypes.c_int]
        library.omp_set_num_threads.restype = None
    except (OSError, AttributeError):
        return None
    return library


OPENMP = _openmp()


def run(make_task: Callable[[], Callable[[int], None]], costs: Sequence[int]) -> None:
    """
    Do tasks 0, 1, ..., of which none waits for another, of these `costs` (multiply-adds). Each of torch's threads
    calls `make_task` once, for a task with its own buffers, and takes one number after the other. Little work, work
    that would leave threads idle, and all of it where torch has no such threads is the caller's, task by task, with
    torch's threads in each operator.
    """
    openmp, threads, count = OPENMP, torch.get_num_threads(), len(costs)
    ends = [0] * threads
    for cost in costs:
        heapq.heapreplace(ends, ends[0] + cost)
    idle = max(ends) * threads > 1.2 * sum(costs)
    # a mode that watches operators (fake tensors, counters) sees those of the calling thread only
    if openmp is None or parts(sum(costs)) == 1 or idle or torch._C._len_torch_dispatch_stack():
        task = make_task()
        for index in range(count):
            task(index)
        return
    inference = torch.is_inference_mode_enabled()
    queue = itertools.count()  # its `next` is one step of the interpreter, so that no task is given out twice
    errors = []

    def region(_: int | None) -> None:
        try:
            torch.get_num_threads()  # the first call in a thread takes the process's number
            openmp.omp_set_num_threads(1)  # for this region: products that share their work wait for threads at work
            with torch.inference_mode(inference), torch.no_grad():
                task = make_task()
                while not errors and (index := next(queue)) < count:
                    task(index)
        except BaseException as error:
            errors.append(error)

    openmp.GOMP_parallel(_Region(region), None, min(threads, count), 0)
    if errors:
        raise errors[0]


def parts(cost: int) -> int:
    """Into how many tasks that much work should be divided, so that threads end at about the same time."""
    threads = torch.get_num_threads()
    return 1 if threads == 1 or OPENMP is None or cost < QUICK_MULTIPLY_ADDS else 4 * threads
