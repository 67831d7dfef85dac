"""What the C library does with memory that a training step gives back."""

import ctypes
import os
import sys


NEVER_TRIM, NEVER_MAP = (-1, -1), (-4, 0)  # parameters of glibc's mallopt, M_TRIM_THRESHOLD and M_MMAP_MAX, and values
CHOSEN_BY = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")  # what the names of variables that choose otherwise begin with


def keep_memory() -> None:
    """
    Keep it for the next step. Otherwise it goes back to the system, which maps and zeroes all pages anew each step.
    For tensors of many MB, as logits are, that can take as long as their numbers.

    It holds for the whole process, so commands ask for it, and no function that others call. Does nothing where a
    variable says how memory is to be allocated, and where the C library is not glibc.
    """
    if not sys.platform.startswith("linux") or any(name.startswith(CHOSEN_BY) for name in os.environ):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        for parameter, value in (NEVER_TRIM, NEVER_MAP):
            library.mallopt(parameter, value)
