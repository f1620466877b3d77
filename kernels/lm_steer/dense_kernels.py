"""LM-Steer's product as one dense matrix, over tiles of rows: fewer bytes if ``2 r > d``.

    change = scale * X M_free^T + epsilon * X M_fixed^T     where scale is not 0, else 0

with ``M = (P1 P2^T)^T [d, d]``, out by in; products accumulate in float32, and the matrix is the
first operand of the product, as the weights are in ``low_rank_kernels`` (see ``packing``).
"""

import triton
import triton.language as tl

from vllm_steer.kernels.lm_steer.change_kernels import write_change
from vllm_steer.kernels.lm_steer.packing import dot, load_x, summed_parts


@triton.jit
def times_matrix(
    x,
    table,
    matrix,
    rows,
    first,
    last,
    block,
    width,
    x_row_stride,
    x_column_stride,
    PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """``X M^T`` for one block of the columns of the result."""
    m = tl.arange(0, PARTS * BLOCK_OUT)
    column = block * BLOCK_OUT + m % BLOCK_OUT
    weights = table + (matrix.to(tl.int64) * width + column)[:, None] * width
    n = tl.arange(0, PARTS * BLOCK_ROWS)
    pair = first + n % BLOCK_ROWS
    row = tl.load(rows + pair, mask=pair < last, other=0).to(tl.int64)[:, None]
    k = tl.arange(0, BLOCK_IN)[None, :]
    acc = tl.zeros((PARTS * BLOCK_OUT, PARTS * BLOCK_ROWS), tl.float32)
    for offset in range(0, width, PARTS * BLOCK_IN):
        inner = offset + (m // BLOCK_OUT * BLOCK_IN)[:, None] + k
        mask = (column < width)[:, None] & (inner < width)
        a = tl.load(weights + inner, mask=mask, other=0.0)
        inner = offset + (n // BLOCK_ROWS * BLOCK_IN)[:, None] + k
        mask = (pair < last)[:, None] & (inner < width)
        at = row * x_row_stride + inner * x_column_stride
        b = load_x(x, at, mask, table.dtype.element_ty)
        acc = dot(a, tl.trans(b), acc)
    return tl.trans(summed_parts(acc, PARTS, BLOCK_OUT, BLOCK_ROWS))


@triton.jit
def dense(
    x,
    table,
    rows,
    scales,
    bounds,
    epsilons,
    out,
    changes,
    width,
    x_row_stride,
    x_column_stride,
    FUSED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """The change of a tile's rows; programs ``(tile, block of the width)``."""
    tile = tl.program_id(0)
    first = tl.load(bounds + 5 * tile)
    if first < 0:
        return
    last = tl.load(bounds + 5 * tile + 1)
    free = tl.load(bounds + 5 * tile + 2)
    fixed = tl.load(bounds + 5 * tile + 3)
    block = tl.program_id(1)
    change = times_matrix(
        x,
        table,
        free,
        rows,
        first,
        last,
        block,
        width,
        x_row_stride,
        x_column_stride,
        PARTS,
        BLOCK_ROWS,
        BLOCK_OUT,
        BLOCK_IN,
    )
    pairs = first + tl.arange(0, BLOCK_ROWS)
    live = pairs < last
    scale = tl.load(scales + pairs, mask=live, other=0.0)
    change *= scale[:, None]
    if fixed >= 0:
        change += tl.load(epsilons + tile) * times_matrix(
            x,
            table,
            fixed,
            rows,
            first,
            last,
            block,
            width,
            x_row_stride,
            x_column_stride,
            PARTS,
            BLOCK_ROWS,
            BLOCK_OUT,
            BLOCK_IN,
        )
    change = tl.where((scale != 0)[:, None], change, 0.0)
    row = tl.load(rows + pairs, mask=live, other=0).to(tl.int64)
    columns = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    mask = live[:, None] & (columns < width)[None, :]
    write_change(
        x,
        out,
        changes,
        change,
        pairs,
        row,
        columns,
        mask,
        width,
        x_row_stride,
        x_column_stride,
        FUSED,
    )
