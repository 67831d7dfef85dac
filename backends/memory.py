"""
Memory of large tensors that every training step makes and gives back: gradients, and what is kept for them.

Linux maps memory as it is written, and C libraries hand large blocks back to it: each step, every page is mapped and
zeroed anew, which for experts takes as long as a third of their products. Blocks are kept here instead and used again,
and the system is told that it may take back what they hold meanwhile if it is short of memory.
"""

import math
import mmap
import weakref
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor


LARGE = 1 << 22  # bytes; smaller tensors are torch's
LINUX = hasattr(mmap, "MADV_FREE") and hasattr(mmap, "MADV_HUGEPAGE")

_blocks: dict[int, list[mmap.mmap]] = defaultdict(list)  # not in use, by size


def empty(size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As torch.empty."""
    count = math.prod(size)
    if not LINUX or count * dtype.itemsize < LARGE:
        return torch.empty(size, dtype=dtype)
    # few sizes, so that a block suits more or fewer rows as well; what is not touched of it takes no memory
    nbytes = 1 << (count * dtype.itemsize - 1).bit_length()
    try:
        block = _blocks[nbytes].pop()
    except IndexError:
        block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block.madvise(mmap.MADV_HUGEPAGE)  # pages of 2 MB are mapped several times as fast
    held = memoryview(block)  # by the tensor's storage alone
    weakref.finalize(held, _give_back, block).atexit = False
    return torch.frombuffer(held, dtype=dtype, count=count).view(size)


def _give_back(block: mmap.mmap) -> None:
    block.madvise(mmap.MADV_FREE)
    _blocks[len(block)].append(block)


def release() -> None:
    """Give the system back what is not in use."""
    _blocks.clear()
