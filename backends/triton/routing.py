"""
Triton kernels that sort rows by expert: a stable counting sort. A row is one of the S * k ids of experts, and the
row's slot its place among these; ids from E on, of experts that another process has, count as E and come last.
"""

import triton
import triton.language as tl


@triton.jit
def _experts_of(ids, slot, rows, E):
    """The slots' ids; what lies beyond the last row counts as E, which no expert follows."""
    return tl.minimum(tl.load(ids + slot, mask=slot < rows, other=E), E).to(tl.int32)


@triton.jit(do_not_specialize=["rows", "E"])  # one program for all numbers of rows
def count(ids, counts, rows, E, CHUNK: tl.constexpr, BINS: tl.constexpr):
    """counts (E + 1, chunks): how many of a chunk's ids are of each expert."""
    slot = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    loads = tl.histogram(_experts_of(ids, slot, rows, E), BINS)
    bins = tl.arange(0, BINS)
    tl.store(counts + bins * tl.num_programs(0) + tl.program_id(0), loads, mask=bins <= E)


@triton.jit(do_not_specialize=["rows", "chunks", "number", "E"])
def place(
    ids, sums, slots, ends, blocks, rows, chunks, number, E,
    SIZE: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """
    From the running sums of `counts`: a chunk's rows in order, `slots` (rows,), and for expert `program_id` its end,
    `ends` (E,), and its blocks of SIZE rows, `blocks` (number, 2) of expert and first row. Expert E has those that
    are not needed.
    """
    if tl.program_id(0) < chunks:
        slot = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
        expert = _experts_of(ids, slot, rows, E)
        cell = expert * chunks + tl.program_id(0)
        before = tl.load(sums + cell - 1, mask=cell > 0, other=0)
        same = (expert[None, :] == expert[:, None]) & (slot[None, :] < slot[:, None])
        tl.store(slots + before + tl.sum(same.to(tl.int32), 1), slot, mask=slot < rows)
    mine = tl.program_id(0)
    if mine <= E:
        bins = tl.arange(0, BINS)
        end = tl.load(sums + (bins + 1) * chunks - 1, mask=bins < E, other=0)
        begin = tl.load(sums + bins * chunks - 1, mask=(bins > 0) & (bins < E), other=0)
        block = tl.sum(tl.where(bins < mine, tl.cdiv(end - begin, SIZE), 0), 0)
        begin = tl.sum(tl.where(bins == mine, begin, 0), 0)
        end = tl.sum(tl.where(bins == mine, end, 0), 0)
        tl.store(ends + mine, end, mask=mine < E)
        needed = tl.where(mine < E, tl.cdiv(end - begin, SIZE), number - block)
        for start in range(0, needed, BLOCKS):
            own = start + tl.arange(0, BLOCKS)
            tl.store(blocks + 2 * (block + own), mine, mask=own < needed)
            tl.store(blocks + 2 * (block + own) + 1, begin + own * SIZE, mask=own < needed)


@triton.jit(do_not_specialize=["rows", "number", "E"])
def route_few(
    ids, slots, ends, blocks, rows, number, E,
    SIZE: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """As `count` and `place`, in one program for up to CHUNK rows; BLOCKS is at least `number`."""
    slot = tl.arange(0, CHUNK)
    expert = _experts_of(ids, slot, rows, E)
    bins = tl.arange(0, BINS)
    loads = tl.where(bins < E, tl.histogram(expert, BINS), 0)
    end = tl.cumsum(loads, 0)
    tl.store(ends + bins, end, mask=bins < E)
    same = (expert[None, :] == expert[:, None]) & (slot[None, :] < slot[:, None])
    before = same | (expert[None, :] < expert[:, None])
    tl.store(slots + tl.sum(before.to(tl.int32), 1), slot, mask=slot < rows)
    needed = tl.cdiv(loads, SIZE)
    last = tl.cumsum(needed, 0)
    block = tl.arange(0, BLOCKS)
    tl.store(blocks + 2 * block, E, mask=(block >= tl.sum(needed, 0)) & (block < number))
    own = tl.arange(0, CHUNK // SIZE)[None, :]
    here = own < needed[:, None]
    places = blocks + 2 * ((last - needed)[:, None] + own)
    tl.store(places, tl.broadcast_to(bins[:, None], here.shape), mask=here)
    tl.store(places + 1, (end - loads)[:, None] + own * SIZE, mask=here)
