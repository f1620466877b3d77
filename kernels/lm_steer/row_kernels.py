"""LM-Steer's products with one program per row: for engines with small batches.

The same three steps as over tiles, but products are sums of elementwise products in float32,
without tensor cores and without empty rows of a tile. ``expand_row`` folds the partial sums itself,
and the intermediate result between the two factors stays in float32.
"""

import triton
import triton.language as tl

from vllm_steer.kernels.lm_steer.change_kernels import write_change


@triton.jit(do_not_specialize=["num_pairs"])
def shrink_row(
    x,
    table,
    rows,
    bounds,
    work,
    partials,
    num_pairs,
    width,
    rank_stride,
    x_row_stride,
    x_column_stride,
    CHUNK: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """``partials[k, pair, rank]``; programs ``(work item, chunk)``."""
    tile = tl.load(work + 2 * tl.program_id(0))
    if tile < 0:
        return
    chunk = tl.program_id(1)
    pair = tl.load(bounds + 5 * tile)
    start = tl.load(bounds + 5 * tile + 2)
    rank = tl.load(bounds + 5 * tile + 4) - start
    row = tl.load(rows + pair).to(tl.int64)
    ranks = tl.load(work + 2 * tl.program_id(0) + 1) + tl.arange(0, BLOCK_RANKS)
    weights = table + (start + ranks).to(tl.int64)[:, None] * width
    acc = tl.zeros((BLOCK_RANKS, BLOCK_WIDTH), tl.float32)
    for offset in range(0, CHUNK, BLOCK_WIDTH):
        columns = chunk * CHUNK + offset + tl.arange(0, BLOCK_WIDTH)
        inside = columns < width
        at = row * x_row_stride + columns * x_column_stride
        a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        mask = (ranks < rank)[:, None] & inside[None, :]
        acc += tl.load(weights + columns[None, :], mask=mask, other=0.0).to(tl.float32) * a[None, :]
    index = (chunk.to(tl.int64) * num_pairs + pair) * rank_stride + ranks
    tl.store(partials + index, tl.sum(acc, axis=1), mask=ranks < rank)


@triton.jit(do_not_specialize=["num_pairs"])
def expand_row(
    x,
    partials,
    table,
    rows,
    scales,
    bounds,
    epsilons,
    out,
    changes,
    num_pairs,
    width,
    rank_stride,
    x_row_stride,
    x_column_stride,
    FUSED: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """The change of a row; programs ``(tile, block of the width)``."""
    tile = tl.program_id(0)
    pair = tl.load(bounds + 5 * tile)
    if pair < 0:
        return
    start = tl.load(bounds + 5 * tile + 2)
    free = tl.load(bounds + 5 * tile + 3) - start
    rank = tl.load(bounds + 5 * tile + 4) - start
    scale = tl.load(scales + pair)
    rank = tl.where(scale != 0, rank, 0)  # no change, and no weights to read
    epsilon = tl.load(epsilons + tile)
    columns = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = columns < width
    acc = tl.zeros((BLOCK_WIDTH, BLOCK_RANKS), tl.float32)
    for offset in range(0, rank, BLOCK_RANKS):
        ranks = offset + tl.arange(0, BLOCK_RANKS)
        total = tl.zeros((BLOCK_RANKS,), tl.float32)
        for chunk in tl.static_range(CHUNKS):
            at = (chunk * num_pairs.to(tl.int64) + pair) * rank_stride + ranks
            total += tl.load(partials + at, mask=ranks < rank, other=0.0)
        total *= tl.where(ranks < free, scale, epsilon)
        mask = (ranks < rank)[None, :] & inside[:, None]
        at = (start + ranks).to(tl.int64)[None, :] * width + columns[:, None]
        acc += tl.load(table + at, mask=mask, other=0.0).to(tl.float32) * total[None, :]
    pairs = pair + tl.arange(0, 1)
    row = tl.load(rows + pairs).to(tl.int64)
    write_change(
        x,
        out,
        changes,
        tl.sum(acc, axis=1)[None, :],
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
def row_times_matrix(
    x,
    table,
    matrix,
    columns,
    width,
    x_column_stride,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """``x M^T`` for one block of the columns of the result."""
    weights = table + (matrix.to(tl.int64) * width + columns)[:, None] * width
    acc = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    for offset in range(0, width, BLOCK_IN):
        inner = offset + tl.arange(0, BLOCK_IN)
        a = tl.load(x + inner * x_column_stride, mask=inner < width, other=0.0).to(tl.float32)
        mask = (columns < width)[:, None] & (inner < width)[None, :]
        acc += tl.load(weights + inner[None, :], mask=mask, other=0.0).to(tl.float32) * a[None, :]
    return tl.sum(acc, axis=1)


@triton.jit
def dense_row(
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
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """The change of a row by dense matrices; programs ``(tile, block of the width)``."""
    tile = tl.program_id(0)
    pair = tl.load(bounds + 5 * tile)
    if pair < 0:
        return
    free = tl.load(bounds + 5 * tile + 2)
    fixed = tl.load(bounds + 5 * tile + 3)
    pairs = pair + tl.arange(0, 1)
    row = tl.load(rows + pairs).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    x_row = x + tl.load(rows + pair).to(tl.int64) * x_row_stride
    scale = tl.load(scales + pair)
    change = scale * row_times_matrix(
        x_row, table, free, columns, width, x_column_stride, BLOCK_OUT, BLOCK_IN
    )
    if fixed >= 0:
        change += tl.load(epsilons + tile) * row_times_matrix(
            x_row, table, fixed, columns, width, x_column_stride, BLOCK_OUT, BLOCK_IN
        )
    change = tl.where(scale != 0, change, 0.0)
    write_change(
        x,
        out,
        changes,
        change[None, :],
        pairs,
        row,
        columns,
        (columns < width)[None, :],
        width,
        x_row_stride,
        x_column_stride,
        FUSED,
    )
