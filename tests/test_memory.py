"""Large tensors in huge pages."""

import mmap
from types import SimpleNamespace

import torch

from mhmoe.backends import memory


def test_the_pages_within_a_large_tensor_are_advised(monkeypatch):
    calls = []
    monkeypatch.setattr(memory, "LIBRARY", SimpleNamespace(madvise=lambda *args: calls.append(args)))
    tensor = torch.empty(memory.LARGE + 5, dtype=torch.uint8)
    assert memory.in_huge_pages(tensor) is tensor
    [(start, size, advice)] = calls
    assert advice == memory.HUGE_PAGES
    assert start % mmap.PAGESIZE == size % mmap.PAGESIZE == 0
    assert tensor.data_ptr() <= start < tensor.data_ptr() + mmap.PAGESIZE
    assert 0 <= tensor.data_ptr() + tensor.nbytes - (start + size) < mmap.PAGESIZE


def test_small_tensors_are_left_alone(monkeypatch):
    monkeypatch.setattr(memory, "LIBRARY", SimpleNamespace())
    memory.in_huge_pages(torch.empty(memory.LARGE - 1, dtype=torch.uint8))


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(memory, "LIBRARY", None)
    tensor = torch.empty(memory.LARGE, dtype=torch.uint8)
    assert memory.in_huge_pages(tensor) is tensor


def test_what_is_written_stays():
    tensor = memory.in_huge_pages(torch.empty(memory.LARGE, dtype=torch.float32))
    tensor.copy_(expected := torch.arange(memory.LARGE, dtype=torch.float32))
    assert torch.equal(tensor, expected)
