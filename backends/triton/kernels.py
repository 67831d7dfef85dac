"""
Triton kernels of SwiGLU experts. Imported only where Triton is installed.

Rows are sorted by expert and cut into blocks of one expert each. D is the tokens' width, F an expert's inner size. A
program does one block of rows and one block of columns; what a row needs of its token is gathered as it is read, and
what it adds to its token goes to a place of its own, so that no two programs write to the same number: the sums over
the experts of a token, and all results, are the same in every run.

Programs that share rows follow each other, then those that share an expert, so that both are read again from the L2
cache. Rows beyond the end of an expert are read from row 0, which is cheaper than a mask, and not written.
"""

import triton
import triton.language as tl


@triton.jit
def _below(offsets, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """offsets < SIZE, which the compiler knows to hold where blocks divide the size."""
    return tl.full(offsets.shape, 1, tl.int1) if SIZE % BLOCK == 0 else offsets < SIZE


@triton.jit
def first_product(
    hidden, weight, first, inner, slots, ends, blocks, E,
    D: tl.constexpr, F: tl.constexpr, TOP_K: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """inner (rows, F) = silu(gate) * up, with the gates and ups of the tokens; first (rows, 2F) keeps these."""
    parts = tl.cdiv(F, COLUMNS)
    block = tl.program_id(0) // parts
    expert = tl.load(blocks + 2 * block).to(tl.int64)
    if expert >= E:
        return
    begin = tl.load(blocks + 2 * block + 1)
    row = tl.arange(0, ROWS)
    here = begin + row < tl.load(ends + expert)
    token = (tl.load(slots + begin + row, mask=here, other=0) // TOP_K).to(tl.int64)
    columns = tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)
    wide = _below(columns, F, COLUMNS)
    gates = weight + expert * 2 * F * D
    ups = gates + F * D
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, D, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        deep = _below(depth, D, DEPTH)
        left = tl.load(hidden + token[:, None] * D + depth[None, :], mask=deep[None, :], other=0.0)
        places = columns[None, :] * D + depth[:, None]
        mask = deep[:, None] & wide[None, :]
        gate = tl.dot(left, tl.load(gates + places, mask=mask, other=0.0), gate, input_precision=PRECISION)
        up = tl.dot(left, tl.load(ups + places, mask=mask, other=0.0), up, input_precision=PRECISION)
    mask = here[:, None] & wide[None, :]
    if KEEP:
        kept = first + begin.to(tl.int64) * 2 * F + row[:, None] * 2 * F + columns[None, :]
        tl.store(kept, gate, mask=mask)
        tl.store(kept + F, up, mask=mask)
    written = inner + begin.to(tl.int64) * F + row[:, None] * F + columns[None, :]
    tl.store(written, gate * tl.sigmoid(gate) * up, mask=mask)


@triton.jit
def scattered_product(
    left, weight, output, slots, slot_weights, ends, blocks, E,
    N: tl.constexpr, K: tl.constexpr, COLUMN_STRIDE: tl.constexpr, DEPTH_STRIDE: tl.constexpr,
    WEIGHTED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """output (slots, N) = left (rows, K) times the expert's matrix, times the slot's weight, at the row's slot."""
    parts = tl.cdiv(N, COLUMNS)
    block = tl.program_id(0) // parts
    expert = tl.load(blocks + 2 * block).to(tl.int64)
    if expert >= E:
        return
    begin = tl.load(blocks + 2 * block + 1)
    row = tl.arange(0, ROWS)
    here = begin + row < tl.load(ends + expert)
    columns = tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)
    wide = _below(columns, N, COLUMNS)
    matrix = weight + expert * N * K
    rows = left + begin.to(tl.int64) * K + tl.where(here, row, 0)[:, None] * K
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, K, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        deep = _below(depth, K, DEPTH)
        places = columns[None, :] * COLUMN_STRIDE + depth[:, None] * DEPTH_STRIDE
        right = tl.load(matrix + places, mask=deep[:, None] & wide[None, :], other=0.0)
        values = tl.load(rows + depth[None, :], mask=deep[None, :], other=0.0)
        product = tl.dot(values, right, product, input_precision=PRECISION)
    slot = tl.load(slots + begin + row, mask=here, other=0).to(tl.int64)
    if WEIGHTED:
        product *= tl.load(slot_weights + slot).to(tl.float32)[:, None]
    tl.store(output + slot[:, None] * N + columns[None, :], product, mask=here[:, None] & wide[None, :])


@triton.jit
def inner_gradient(
    grad_output, weight, first, slot_weights, grad_first, weighted_inner, grad_weights, slots, ends, blocks,
    E, D: tl.constexpr, F: tl.constexpr, TOP_K: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """
    From the gradient of the tokens' outputs: of the first product (rows, 2F), and of the slots' weights, in a part for
    each block of columns (slots, parts); and the inner rows again, times their weight (rows, F).
    """
    parts = tl.cdiv(F, COLUMNS)
    block = tl.program_id(0) // parts
    expert = tl.load(blocks + 2 * block).to(tl.int64)
    if expert >= E:
        return
    begin = tl.load(blocks + 2 * block + 1)
    row = tl.arange(0, ROWS)
    here = begin + row < tl.load(ends + expert)
    slot = tl.load(slots + begin + row, mask=here, other=0)
    token = (slot // TOP_K).to(tl.int64)
    part = tl.program_id(0) % parts
    columns = part * COLUMNS + tl.arange(0, COLUMNS)
    wide = _below(columns, F, COLUMNS)
    matrix = weight + expert * D * F
    grad = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, D, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        deep = _below(depth, D, DEPTH)
        left = tl.load(grad_output + token[:, None] * D + depth[None, :], mask=deep[None, :], other=0.0)
        places = depth[:, None] * F + columns[None, :]
        right = tl.load(matrix + places, mask=deep[:, None] & wide[None, :], other=0.0)
        grad = tl.dot(left, right, grad, input_precision=PRECISION)
    slot_weight = tl.load(slot_weights + slot).to(tl.float32)[:, None]
    half: tl.constexpr = COLUMNS // 2
    # in halves: as a whole, what is computed from the product does not fit the registers
    grad, right_grad = tl.split(tl.permute(tl.reshape(grad, (ROWS, 2, half)), (0, 2, 1)))
    kept = first + begin.to(tl.int64) * 2 * F
    inner = weighted_inner + begin.to(tl.int64) * F
    written = grad_first + begin.to(tl.int64) * 2 * F
    columns = part * COLUMNS + tl.arange(0, half)
    sums = _gate_gradient(grad, slot_weight, kept, inner, written, row, here, columns, F, COLUMNS)
    sums += _gate_gradient(right_grad, slot_weight, kept, inner, written, row, here, columns + half, F, COLUMNS)
    tl.store(grad_weights + slot.to(tl.int64) * parts + part, sums, mask=here)


@triton.jit
def _gate_gradient(
    grad, slot_weight, kept, inner, written, row, here, columns, F: tl.constexpr, COLUMNS: tl.constexpr
):
    """Through the gate, at some columns; the sums over these (ROWS,) that add to the gradient of the weights."""
    mask = here[:, None] & _below(columns, F, COLUMNS)[None, :]
    places = row[:, None] * 2 * F + columns[None, :]
    gate = tl.load(kept + places, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(kept + F + places, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(inner + row[:, None] * F + columns[None, :], silu * up * slot_weight, mask=mask)
    sums = tl.sum(grad * silu * up, 1)
    grad *= slot_weight
    tl.store(written + places, grad * up * (sigmoid + silu * (1 - sigmoid)), mask=mask)
    tl.store(written + F + places, grad * silu, mask=mask)
    return sums


@triton.jit
def weight_gradient(
    left, source, output, slots, ends,
    A: tl.constexpr, B: tl.constexpr, LEFT_STRIDE: tl.constexpr, RIGHT_STRIDE: tl.constexpr,
    TOP_K: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """output[expert] (A, B) = over the expert's rows, left (rows, A) times the source (tokens, B) of the token."""
    across_parts = tl.cdiv(B, COLUMNS)
    parts = tl.cdiv(A, ROWS) * across_parts
    expert = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    end = tl.load(ends + expert)
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    down = part // across_parts * ROWS + tl.arange(0, ROWS)
    across = part % across_parts * COLUMNS + tl.arange(0, COLUMNS)
    high, wide = _below(down, A, ROWS), _below(across, B, COLUMNS)
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(begin, end, DEPTH):
        row = start + tl.arange(0, DEPTH)
        here = row < end
        token = (tl.load(slots + row, mask=here, other=0) // TOP_K).to(tl.int64)
        values = left + row.to(tl.int64)[None, :] * A + down[:, None]
        values = tl.load(values, mask=here[None, :] & high[:, None], other=0.0)
        right = tl.load(source + token[:, None] * B + across[None, :], mask=here[:, None] & wide[None, :], other=0.0)
        product = tl.dot(values, right, product, input_precision=PRECISION)
    places = down[:, None] * LEFT_STRIDE + across[None, :] * RIGHT_STRIDE
    written = output + expert.to(tl.int64) * A * B + places
    tl.store(written, product, mask=high[:, None] & wide[None, :])
