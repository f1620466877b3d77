"""LM-Steer's product as one dense matrix, over tiles of rows: where ``2 r > d`` it is fewer bytes.

    change = scale * X M_free^T + epsilon * X M_fixed^T     where scale is not 0, else 0

with ``M = (P1 P2^T)^T [d, d]``, out by in; products accumulate in float32.
"""

import triton
import triton.language as tl

from vllm_steer.kernels.lm_steer.change_kernels import write_change
from vllm_steer.kernels.lm_steer.low_rank_kernels import dot, load_x


@triton.jit
def times_matrix(
    x,
    table,
    matrix,
    row,
    live,
    columns,
    width,
    x_row_stride,
    x_column_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """``X M^T`` for some of the columns of the result."""
    inside = columns < width
    weights = table + (matrix.to(tl.int64) * width + columns)[:, None] * width
    acc = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
    for offset in range(0, width, BLOCK_IN):
        inner = offset + tl.arange(0, BLOCK_IN)
        mask = live[:, None] & (inner < width)[None, :]
        a = load_x(x, row, inner, x_row_stride, x_column_stride, mask, table.dtype.element_ty)
        mask = inside[:, None] & (inner < width)[None, :]
        b = tl.load(weights + inner[None, :], mask=mask, other=0.0)
        acc = dot(a, tl.trans(b), acc)
    return acc


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
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """The change of a tile's rows; programs ``(tile, block of the width)``."""
    tile = tl.program_id(0)
    first = tl.load(bounds + 5 * tile)
    if first < 0:
        return
    pairs = first + tl.arange(0, BLOCK_ROWS)
    live = pairs < tl.load(bounds + 5 * tile + 1)
    free = tl.load(bounds + 5 * tile + 2)
    fixed = tl.load(bounds + 5 * tile + 3)
    row = tl.load(rows + pairs, mask=live, other=0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    change = times_matrix(
        x,
        table,
        free,
        row,
        live,
        columns,
        width,
        x_row_stride,
        x_column_stride,
        BLOCK_ROWS,
        BLOCK_OUT,
        BLOCK_IN,
    )
    scale = tl.load(scales + pairs, mask=live, other=0.0)
    change *= scale[:, None]
    if fixed >= 0:
        change += tl.load(epsilons + tile) * times_matrix(
            x,
            table,
            fixed,
            row,
            live,
            columns,
            width,
            x_row_stride,
            x_column_stride,
            BLOCK_ROWS,
            BLOCK_OUT,
            BLOCK_IN,
        )
    change = tl.where((scale != 0)[:, None], change, 0.0)
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
