"""Large tensors in huge pages."""

import gc
import mmap
import weakref
from types import SimpleNamespace

import pytest
import torch

from mhmoe.backends import memory


class TestEmpty:
    @pytest.fixture
    def advice(self, monkeypatch):
        calls = []
        monkeypatch.setattr(memory, "LIBRARY", SimpleNamespace(madvise=lambda *args: calls.append(args)))
        return calls

    def test_the_pages_within_a_large_tensor_are_advised(self, advice):
        tensor = memory.empty((5, memory.LARGE), torch.uint8)
        [(start, size, hint)] = advice
        assert hint == memory.HUGE_PAGES
        assert start % mmap.PAGESIZE == size % mmap.PAGESIZE == 0
        assert tensor.data_ptr() <= start < tensor.data_ptr() + mmap.PAGESIZE
        assert 0 <= tensor.data_ptr() + tensor.nbytes - (start + size) < mmap.PAGESIZE

    def test_small_tensors_are_left_alone(self, advice):
        memory.empty((memory.LARGE - 1,), torch.uint8)
        assert not advice

    @pytest.mark.parametrize("library", ["this system's", None])
    def test_holds_what_is_written(self, library, monkeypatch):
        if library is None:
            monkeypatch.setattr(memory, "LIBRARY", None)
        tensor = memory.empty((memory.LARGE,), torch.float32)
        tensor.copy_(expected := torch.arange(memory.LARGE, dtype=torch.float32))
        assert torch.equal(tensor, expected)


class TestZeros:
    @pytest.fixture
    def maps(self, monkeypatch):
        """The memory that was mapped, while it is there."""
        maps = weakref.WeakSet()

        class Map(mmap.mmap):
            def __init__(self, *args, **kwargs):
                maps.add(self)

        monkeypatch.setattr(mmap, "mmap", Map)
        return maps

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("size", [(0, 4), (3, 5), (memory.LARGE, 2)], ids=str)
    def test_as_those_of_torch(self, size, dtype, maps):
        tensor = memory.zeros(size, dtype)
        expected = torch.zeros(size, dtype=dtype)
        assert tensor.dtype == dtype
        assert tensor.stride() == expected.stride()
        assert torch.equal(tensor, expected)
        assert torch.equal(tensor.add_(1), expected + 1)
        assert len(maps) == (size[0] == memory.LARGE and memory.HUGE_PAGES is not None)

    @pytest.mark.skipif(memory.HUGE_PAGES is None, reason="this system has no huge pages")
    def test_the_memory_goes_with_the_last_tensor(self, maps):
        part = memory.zeros((memory.LARGE,), torch.float32)[5:]
        gc.collect()
        assert len(maps) == 1
        assert not part.any()
        del part
        gc.collect()
        assert not maps

    def test_where_there_are_no_huge_pages(self, maps, monkeypatch):
        monkeypatch.setattr(memory, "HUGE_PAGES", None)
        assert not memory.zeros((memory.LARGE,), torch.float32).any()
        assert not maps
