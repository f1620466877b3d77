"""Adds a pair's change to its row, or stores it and sums the changes by row.

Both ways round equally: the row and its changes are added in float32, in ascending order of slot,
and rounded once. Kernels are compiled without FMA contraction, so both ways give the same bits.
"""

import triton
import triton.language as tl

from vllm_steer.kernels.rounding import rounded


@triton.jit
def write_change(
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
    FUSED: tl.constexpr,
):
    """``out[row] = x[row] + change`` if FUSED, else ``changes[pair] = change`` (float32)."""
    if FUSED:
        at = row[:, None] * x_row_stride + columns[None, :] * x_column_stride
        total = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) + change
        at = row[:, None] * width + columns[None, :]
        tl.store(out + at, rounded(total, out.dtype.element_ty), mask=mask)
    else:
        at = pairs.to(tl.int64)[:, None] * width + columns[None, :]
        tl.store(changes + at, change, mask=mask)


@triton.jit
def constant(
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
    BLOCK_WIDTH: tl.constexpr,
):
    """``scale * free + epsilon * fixed``, or 0 where ``scale`` is 0; programs ``(tile, block of the
    width)``.
    """
    tile = tl.program_id(0)
    pair = tl.load(bounds + 5 * tile)
    if pair < 0:
        return
    free = tl.load(bounds + 5 * tile + 2).to(tl.int64)
    fixed = tl.load(bounds + 5 * tile + 3).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = columns < width
    vector = tl.load(table + free * width + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scales + pair)
    change = scale * vector
    if (fixed >= 0) & (scale != 0):
        vector = tl.load(table + fixed * width + columns, mask=inside, other=0.0).to(tl.float32)
        change += tl.load(epsilons + tile) * vector
    pairs = pair + tl.arange(0, 1)
    row = tl.load(rows + pairs).to(tl.int64)
    write_change(
        x,
        out,
        changes,
        change[None, :],
        pairs,
        row,
        columns,
        inside[None, :],
        width,
        x_row_stride,
        x_column_stride,
        FUSED,
    )


@triton.jit
def add_up(
    x,
    changes,
    rows,
    starts,
    order,
    out,
    width,
    x_row_stride,
    x_column_stride,
    BLOCK_WIDTH: tl.constexpr,
):
    """``out[row] = x[row] + sum of its pairs' changes``; programs ``(touched row, block)``."""
    touched = tl.program_id(0)
    row = tl.load(rows + touched).to(tl.int64)
    if row < 0:
        return
    columns = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = columns < width
    at = row * x_row_stride + columns * x_column_stride
    total = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    for index in range(tl.load(starts + touched), tl.load(starts + touched + 1)):
        pair = tl.load(order + index).to(tl.int64)
        total += tl.load(changes + pair * width + columns, mask=inside, other=0.0)
    tl.store(out + row * width + columns, rounded(total, out.dtype.element_ty), mask=inside)
