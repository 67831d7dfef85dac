"""The routing of the Triton experts, in Triton's interpreter where there is no GPU, against torch's stable sort."""

import pytest
import torch


pytest.importorskip("triton")

from mhmoe.backends.triton import experts as gpu
from mhmoe.backends.triton.experts import CHUNK
from mhmoe.backends.triton.tiles import tiles_for


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def reference(index: torch.Tensor, num_experts: int, size: int):
    """Slots (rows,), ends (E,), and the expert and first row of each block that is needed."""
    ids = index.flatten().clamp(max=num_experts)
    loads = ids.bincount(minlength=num_experts + 1)[:num_experts]
    ends = loads.cumsum(0)
    blocks = [
        [expert, start]
        for expert, (end, load) in enumerate(zip(ends.tolist(), loads.tolist(), strict=True))
        for start in range(end - load, end, size)
    ]
    return ids.argsort(stable=True), ends, blocks


def assert_routed(index: torch.Tensor, num_experts: int, dtype: torch.dtype = torch.float32) -> None:
    size = tiles_for(index.numel(), num_experts, dtype, index.device).first.rows
    expected_slots, expected_ends, expected_blocks = reference(index, num_experts, size)
    slots, ends, blocks = gpu.route(index.to(DEVICE), num_experts, dtype)
    assert slots.tolist() == expected_slots.tolist()
    assert not index.numel() or ends.tolist() == expected_ends.tolist()  # nothing reads the ends of no rows
    needed = len(expected_blocks)
    assert blocks[:needed].tolist() == expected_blocks
    assert all(expert == num_experts for expert, _ in blocks[needed:].tolist())


@pytest.mark.parametrize("num_experts", [1, 5, 8, 96])
@pytest.mark.parametrize(("tokens", "top_k"), [(0, 2), (1, 1), (3, 3), (CHUNK, 1), (CHUNK + 1, 1), (170, 3)])
def test_as_a_stable_sort(tokens, top_k, num_experts):
    """No rows, one, and one program's, a row more, and some programs'."""
    generator = torch.Generator().manual_seed(tokens)
    assert_routed(torch.randint(num_experts, (tokens, top_k), generator=generator), num_experts)


@pytest.mark.parametrize("rows", [CHUNK - 5, 4 * CHUNK - 5])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_skewed_loads(rows, share):
    """Of 7 experts the sixth has almost all rows, a tenth, or none."""
    generator = torch.Generator().manual_seed(rows)
    index = torch.randint(5, (rows, 1), generator=generator)
    assert_routed(torch.where(torch.rand(rows, 1, generator=generator) < share, 5, index), 7)


@pytest.mark.parametrize("rows", [CHUNK - 5, 4 * CHUNK - 5])
def test_experts_of_another_process(rows):
    generator = torch.Generator().manual_seed(rows)
    assert_routed(torch.randint(9, (rows, 1), generator=generator), 5)
    assert_routed(torch.full((rows, 1), 5), 5)


@pytest.mark.parametrize("rows", [64, 129, 1100])
def test_large_blocks(rows):
    generator = torch.Generator().manual_seed(rows)
    sizes = set()
    for dtype in (torch.float32, torch.float16):
        assert_routed(torch.randint(2, (rows, 1), generator=generator), 2, dtype)
        sizes.add(tiles_for(rows, 2, dtype, torch.device(DEVICE)).first.rows)
    assert sizes == ({16} if rows == 64 else {64} if rows == 129 else {64, 128})


def test_ids_of_32_bits():
    assert_routed(torch.tensor([[3], [0], [3]], dtype=torch.int32), 4)
