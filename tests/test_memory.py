"""Large tensors of zeros in huge pages."""

import gc
import mmap
import weakref

import pytest
import torch

from mhmoe.backends import memory


@pytest.fixture
def maps(monkeypatch):
    """The memory that was mapped, while it is there."""
    maps = weakref.WeakSet()

    class Map(mmap.mmap):
        def __init__(self, *args, **kwargs):
            maps.add(self)

    monkeypatch.setattr(mmap, "mmap", Map)
    return maps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [(0, 4), (3, 5), (memory.LARGE, 2)], ids=str)
def test_as_those_of_torch(size, dtype, maps):
    tensor = memory.zeros(size, dtype)
    expected = torch.zeros(size, dtype=dtype)
    assert tensor.dtype == dtype
    assert tensor.stride() == expected.stride()
    assert torch.equal(tensor, expected)
    assert torch.equal(tensor.add_(1), expected + 1)
    assert len(maps) == (size[0] == memory.LARGE and hasattr(mmap, "MADV_HUGEPAGE"))


def test_goes_with_the_last_tensor(maps):
    part = memory.zeros((memory.LARGE,), torch.float32)[5:]
    gc.collect()
    assert len(maps) == hasattr(mmap, "MADV_HUGEPAGE")
    assert not part.any()
    del part
    gc.collect()
    assert not maps


def test_where_there_are_no_huge_pages(maps, monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert not memory.zeros((memory.LARGE,), torch.float32).any()
    assert not maps
