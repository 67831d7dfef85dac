"""
Memory of large tensors that every training step makes and gives back: gradients, and what is kept for them.

Linux maps memory as it is written, and C libraries hand large blocks back to it: each step, every page is mapped and
zeroed anew, which for experts takes as long as a third of their products. Blocks are kept here instead and used again.
Of more than WARM_BYTES that are not in use, the system is told that it may take them back if it is short of memory;
for fewer that is not worth the time, a tenth of that of writing them.
"""

import math
import mmap
import weakref
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from .tuning import LARGE_BYTES, WARM_BYTES


LINUX = hasattr(mmap, "MADV_FREE") and hasattr(mmap, "MADV_HUGEPAGE")

_blocks: dict[int, list[tuple[mmap.mmap, bool]]] = defaultdict(list)  # not in use, by size; whether they are warm


def empty(size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As torch.empty."""
    count = math.prod(size)
    if not LINUX or count * dtype.itemsize < LARGE_BYTES:  # torch's own
        return torch.empty(size, dtype=dtype, device="cpu")
    # few sizes, so that a block suits more or fewer rows as well; what is not touched of it takes no memory
    nbytes = 1 << (count * dtype.itemsize - 1).bit_length()
    try:
        block, _ = _blocks[nbytes].pop()
    except IndexError:
        try:
            block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:  # over a limit that the exact size may still be below
            return torch.empty(size, dtype=dtype, device="cpu")
        _advise(block, mmap.MADV_HUGEPAGE)  # pages of 2 MB are mapped several times as fast
    held = memoryview(block)  # by the tensor's storage alone
    weakref.finalize(held, _give_back, block).atexit = False
    return torch.frombuffer(held, dtype=dtype, count=count).view(size)


def _give_back(block: mmap.mmap) -> None:
    # copies, since other threads come and go
    warm = sum(nbytes * sum(is_warm for _, is_warm in list(blocks)) for nbytes, blocks in list(_blocks.items()))
    is_warm = warm + len(block) <= WARM_BYTES
    if is_warm or _advise(block, mmap.MADV_FREE):  # else it is unmapped
        _blocks[len(block)].append((block, is_warm))


def _advise(block: mmap.mmap, advice: int) -> bool:
    """Whether the system takes it: not every kernel and sandbox does."""
    try:
        block.madvise(advice)
    except OSError:
        return False
    return True


def release() -> None:
    """Give the system back what is not in use."""
    _blocks.clear()
