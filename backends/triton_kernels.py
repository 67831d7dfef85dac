"""
Triton kernels of SwiGLU experts. Imported only where Triton is installed.

Rows are sorted by expert and cut into blocks of one expert each. D is the tokens' width, F an expert's inner size. A
program does one block of rows and one block of columns; what a row needs of its token is gathered as it is read, and
what it adds to its token goes to a place of its own, so that no two programs write to the same number: the sums over
the experts of a token, and all results, are the same in every run.
"""

import triton
import triton.language as tl


@triton.jit
def first_product(
    hidden, weight, first, inner, tokens, ends, block_experts, block_starts,
    D, F, E, KEEP: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """inner (rows, F) = silu(gate) * up, with the gates and ups of the tokens; first (rows, 2I) keeps these."""
    expert = tl.load(block_experts + tl.program_id(0)).to(tl.int64)
    if expert >= E:
        return
    rows = tl.load(block_starts + tl.program_id(0)) + tl.arange(0, ROWS)
    here = rows < tl.load(ends + expert)
    token = tl.load(tokens + rows, mask=here, other=0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    wide = columns < F
    matrix = weight + expert * 2 * F * D + columns[None, :] * D
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, D, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        deep = depth < D
        left = tl.load(hidden + token[:, None] * D + depth[None, :], mask=here[:, None] & deep[None, :], other=0.0)
        mask = deep[:, None] & wide[None, :]
        gate = tl.dot(left, tl.load(matrix + depth[:, None], mask=mask, other=0.0), gate, input_precision=PRECISION)
        up = tl.dot(
            left, tl.load(matrix + F * D + depth[:, None], mask=mask, other=0.0), up, input_precision=PRECISION
        )
    mask = here[:, None] & wide[None, :]
    places = rows[:, None].to(tl.int64)
    if KEEP:
        kept = first + places * 2 * F + columns[None, :]
        tl.store(kept, gate, mask=mask)
        tl.store(kept + F, up, mask=mask)
    tl.store(inner + places * F + columns[None, :], gate * tl.sigmoid(gate) * up, mask=mask)


@triton.jit
def scattered_product(
    left, weight, output, slots, row_weights, ends, block_experts, block_starts,
    N, K, E, expert_stride, column_stride, depth_stride, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """output (slots, N) = left (rows, K) times the expert's matrix, times the row's weight, at the row's slot."""
    expert = tl.load(block_experts + tl.program_id(0)).to(tl.int64)
    if expert >= E:
        return
    rows = tl.load(block_starts + tl.program_id(0)) + tl.arange(0, ROWS)
    here = rows < tl.load(ends + expert)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    wide = columns < N
    places = rows[:, None].to(tl.int64)
    matrix = weight + expert * expert_stride + columns[None, :] * column_stride
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, K, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        deep = depth < K
        values = tl.load(left + places * K + depth[None, :], mask=here[:, None] & deep[None, :], other=0.0)
        right = tl.load(matrix + depth[:, None] * depth_stride, mask=deep[:, None] & wide[None, :], other=0.0)
        product = tl.dot(values, right, product, input_precision=PRECISION)
    if WEIGHTED:
        product *= tl.load(row_weights + rows, mask=here, other=0.0).to(tl.float32)[:, None]
    slot = tl.load(slots + rows, mask=here, other=0)
    tl.store(output + slot[:, None] * N + columns[None, :], product, mask=here[:, None] & wide[None, :])


@triton.jit
def inner_gradient(
    grad_output, weight, first, row_weights, grad_first, weighted_inner, grad_weights, tokens, ends, block_experts,
    block_starts, D, F, E, PARTS, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """
    From the gradient of the tokens' outputs: of the first product (rows, 2I), and of the rows' weights, in a part for
    each block of columns (rows, PARTS); and the inner rows again, times their weight (rows, F).
    """
    expert = tl.load(block_experts + tl.program_id(0)).to(tl.int64)
    if expert >= E:
        return
    rows = tl.load(block_starts + tl.program_id(0)) + tl.arange(0, ROWS)
    here = rows < tl.load(ends + expert)
    token = tl.load(tokens + rows, mask=here, other=0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    wide = columns < F
    matrix = weight + expert * D * F + columns[None, :]
    grad = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, D, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        deep = depth < D
        left = tl.load(
            grad_output + token[:, None] * D + depth[None, :], mask=here[:, None] & deep[None, :], other=0.0
        )
        right = tl.load(matrix + depth[:, None] * F, mask=deep[:, None] & wide[None, :], other=0.0)
        grad = tl.dot(left, right, grad, input_precision=PRECISION)
    mask = here[:, None] & wide[None, :]
    places = rows[:, None].to(tl.int64)
    kept = first + places * 2 * F + columns[None, :]
    gate = tl.load(kept, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(kept + F, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(grad_weights + rows * PARTS + tl.program_id(1), tl.sum(grad * silu * up, 1), mask=here)
    row_weight = tl.load(row_weights + rows, mask=here, other=0.0).to(tl.float32)[:, None]
    tl.store(weighted_inner + places * F + columns[None, :], silu * up * row_weight, mask=mask)
    grad *= row_weight
    to_gate = grad * up * (sigmoid + silu * (1 - sigmoid))
    written = grad_first + places * 2 * F + columns[None, :]
    tl.store(written, to_gate, mask=mask)
    tl.store(written + F, grad * silu, mask=mask)


@triton.jit
def weight_gradient(
    left, source, output, tokens, ends, A, B, left_stride, right_stride, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """output[expert] (A, B) = over the expert's rows, left (rows, A) times the source (tokens, B) of the token."""
    expert = tl.program_id(0).to(tl.int64)
    end = tl.load(ends + expert)
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    down = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    across = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    high, wide = down < A, across < B
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, end, DEPTH):
        rows = start + tl.arange(0, DEPTH)
        here = rows < end
        token = tl.load(tokens + rows, mask=here, other=0)
        values = left + rows[None, :].to(tl.int64) * A + down[:, None]
        values = tl.load(values, mask=here[None, :] & high[:, None], other=0.0)
        right = tl.load(source + token[:, None] * B + across[None, :], mask=here[:, None] & wide[None, :], other=0.0)
        product = tl.dot(values, right, product, input_precision=PRECISION)
    written = output + expert * A * B + down[:, None] * left_stride + across[None, :] * right_stride
    tl.store(written, product, mask=high[:, None] & wide[None, :])
