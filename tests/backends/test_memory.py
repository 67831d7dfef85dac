"""Memory that is used again."""

import gc
import threading
from collections import defaultdict

import pytest
import torch

from mhmoe.backends.cpu import memory


SIZE = (memory.LARGE_BYTES // 1024 + 2, 256)  # of float32: a little more than LARGE bytes


@pytest.fixture(autouse=True)
def blocks(monkeypatch):
    """Those that are not in use, by size."""
    gc.collect()  # of other tests, which would be given back amid this one
    blocks = defaultdict(list)
    monkeypatch.setattr(memory, "_blocks", blocks)
    return blocks


needs_linux = pytest.mark.skipif(not memory.LINUX, reason="elsewhere it is torch.empty")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [(0, 4), (3, 5), (memory.LARGE_BYTES, 3)], ids=str)
def test_as_those_of_torch(size, dtype):
    tensor, expected = memory.empty(size, dtype), torch.empty(size, dtype=dtype)
    assert (tensor.shape, tensor.dtype, tensor.stride()) == (expected.shape, dtype, expected.stride())
    assert torch.equal(tensor.fill_(3), expected.fill_(3))


@needs_linux
def test_is_used_again_when_the_last_view_is_gone(blocks):
    tensor = memory.empty(SIZE, torch.float32)
    place, part = tensor.data_ptr(), tensor[5:]
    other = memory.empty(SIZE, torch.float32)
    assert other.data_ptr() != place
    del tensor
    gc.collect()
    assert not any(blocks.values())
    part.fill_(7)
    other.fill_(8)
    assert (part == 7).all()
    del part
    assert [len(free) for free in blocks.values()] == [1]
    again = memory.empty((SIZE[0] + 100, SIZE[1]), torch.float32)
    assert again.data_ptr() == place
    assert not any(blocks.values())


@needs_linux
def test_release_unmaps_what_is_not_in_use():
    used, unused = (memory.empty(SIZE, torch.float32).fill_(1) for _ in range(2))
    place = unused.data_ptr()
    del unused
    assert _is_mapped(place)
    memory.release()
    assert not _is_mapped(place)
    assert (used == 1).all()


def _is_mapped(address: int) -> bool:
    with open("/proc/self/maps") as lines:
        areas = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    return any(start <= address < end for start, end in areas)


@needs_linux
def test_the_system_may_take_back_what_is_more_than_warm(monkeypatch):
    first, second = (memory.empty(SIZE, torch.float32).fill_(1) for _ in range(2))
    size, before = first.nbytes, _lazily_free()
    monkeypatch.setattr(memory, "WARM_BYTES", 3 * size)  # a block of less than two tensors, but no second one
    del first
    assert _lazily_free() == before
    del second
    assert _lazily_free() - before >= size
    again = memory.empty(SIZE, torch.float32).fill_(2)
    assert _lazily_free() == before
    del again
    assert _lazily_free() - before >= size


def _lazily_free() -> int:
    """Bytes of this process that the system may take."""
    with open("/proc/self/smaps_rollup") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("LazyFree:"))


@needs_linux
def test_small_tensors_and_other_systems_are_left_to_torch(blocks, monkeypatch):
    memory.empty((memory.LARGE_BYTES - 1,), torch.uint8)
    monkeypatch.setattr(memory, "LINUX", False)
    memory.empty(SIZE, torch.float32)
    assert not any(blocks.values())


@needs_linux
def test_threads_get_blocks_of_their_own():
    errors = []

    def work(number):
        for _ in range(50):
            tensor = memory.empty(SIZE, torch.float32).fill_(number)
            if not (tensor == number).all():
                errors.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
