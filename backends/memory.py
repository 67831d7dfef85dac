"""Memory of large tensors that are filled once and soon given back, as gradients and what is kept for them."""

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor


LARGE = 1 << 22  # bytes, of some huge pages


def zeros(size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """
    As torch.zeros. Linux maps memory as it is written, and zeroes it then: where it may do so in pages of 2 MB, not
    4 KB, filling 256 MB took 14 ms instead of 76; and what is never written costs nothing.
    """
    count = math.prod(size)
    if count * dtype.itemsize < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size, dtype=dtype)
    pages = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(size)
