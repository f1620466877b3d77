"""LM-Steer's low-rank product over tiles of rows: shrink, fold, expand.

For a tile of rows ``X [m, d]`` of one slot with factors ``A, B [r, d]`` (P1^T and P2^T):

    shrink  partials_k = X[:, chunk k] A[:, chunk k]^T      split-K: chunks of the width
    fold    H = (sum_k partials_k) * scale                  in the order of k, rounded to B's dtype
    expand  change = H B

``scale`` is epsilon times the row's strength, or epsilon alone for fixed columns; where the
strength is 0, ``H`` is 0 in all columns, and so is the change of a row that is not finite. Products
accumulate in float32; ``H`` has to lie within the dtype's range (65504 in float16), as in torch.
Chunks and tiles depend on the bank only, so a row's result does not depend on the rows beside it.
"""

import triton
import triton.language as tl

from vllm_steer.kernels.lm_steer.change_kernels import write_change
from vllm_steer.kernels.rounding import INTERPRETED, rounded


@triton.jit
def dot(a, b, acc):
    """``a b + acc`` in float32; the interpreter has no products of bfloat16."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load_x(x, rows, columns, row_stride, column_stride, mask, dtype: tl.constexpr):
    """A tile of ``x`` in the dtype of the weights."""
    at = rows[:, None] * row_stride + columns[None, :] * column_stride
    tile = tl.load(x + at, mask=mask, other=0.0)
    if x.dtype.element_ty != dtype:
        tile = rounded(tile.to(tl.float32), dtype)
    return tile


@triton.jit(do_not_specialize=["num_pairs"])
def shrink(
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
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """``partials[k, pair, rank]``; programs ``(work item, chunk)``."""
    tile = tl.load(work + 2 * tl.program_id(0))
    if tile < 0:
        return
    chunk = tl.program_id(1)
    first = tl.load(bounds + 5 * tile)
    last = tl.load(bounds + 5 * tile + 1)
    start = tl.load(bounds + 5 * tile + 2)
    rank = tl.load(bounds + 5 * tile + 4) - start
    pairs = first + tl.arange(0, BLOCK_ROWS)
    live = pairs < last
    row = tl.load(rows + pairs, mask=live, other=0).to(tl.int64)
    ranks = tl.load(work + 2 * tl.program_id(0) + 1) + tl.arange(0, BLOCK_RANKS)
    weights = table + (start + ranks).to(tl.int64)[:, None] * width
    acc = tl.zeros((BLOCK_ROWS, BLOCK_RANKS), tl.float32)
    for offset in range(0, CHUNK, BLOCK_WIDTH):
        columns = chunk * CHUNK + offset + tl.arange(0, BLOCK_WIDTH)
        inside = columns < width
        mask = live[:, None] & inside[None, :]
        a = load_x(x, row, columns, x_row_stride, x_column_stride, mask, table.dtype.element_ty)
        mask = (ranks < rank)[:, None] & inside[None, :]
        b = tl.load(weights + columns[None, :], mask=mask, other=0.0)
        acc = dot(a, tl.trans(b), acc)
    place = (chunk.to(tl.int64) * num_pairs + pairs)[:, None] * rank_stride + ranks[None, :]
    tl.store(partials + place, acc, mask=live[:, None])  # zeros in ranks that are not there


@triton.jit(do_not_specialize=["num_pairs"])
def fold(
    partials,
    scales,
    bounds,
    epsilons,
    work,
    inner,
    num_pairs,
    rank_stride,
    CHUNKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
):
    """``inner[pair, rank]``; programs are the work items."""
    tile = tl.load(work + 2 * tl.program_id(0))
    if tile < 0:
        return
    first = tl.load(bounds + 5 * tile)
    last = tl.load(bounds + 5 * tile + 1)
    start = tl.load(bounds + 5 * tile + 2)
    free = tl.load(bounds + 5 * tile + 3) - start
    pairs = first + tl.arange(0, BLOCK_ROWS)
    ranks = tl.load(work + 2 * tl.program_id(0) + 1) + tl.arange(0, BLOCK_RANKS)
    mask = (pairs < last)[:, None]
    place = pairs.to(tl.int64)[:, None] * rank_stride + ranks[None, :]
    total = tl.load(partials + place, mask=mask, other=0.0)
    for chunk in range(1, CHUNKS):
        at = chunk * num_pairs.to(tl.int64) * rank_stride + place
        total += tl.load(partials + at, mask=mask, other=0.0)
    scale = tl.load(scales + pairs, mask=pairs < last, other=0.0)
    epsilon = tl.load(epsilons + tile)
    total *= tl.where((ranks < free)[None, :], scale[:, None], epsilon)
    total = tl.where((scale != 0)[:, None], total, 0.0)
    tl.store(inner + place, rounded(total, inner.dtype.element_ty), mask=mask)


@triton.jit
def expand(
    x,
    inner,
    table,
    rows,
    bounds,
    out,
    changes,
    width,
    rank_stride,
    x_row_stride,
    x_column_stride,
    FUSED: tl.constexpr,
    FOLDED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """The change of a tile's rows; programs ``(tile, block of the width)``."""
    tile = tl.program_id(0)
    first = tl.load(bounds + 5 * tile)
    if first < 0:
        return
    last = tl.load(bounds + 5 * tile + 1)
    start = tl.load(bounds + 5 * tile + 2)
    rank = tl.load(bounds + 5 * tile + 4) - start
    pairs = first + tl.arange(0, BLOCK_ROWS)
    live = pairs < last
    columns = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = columns < width
    written = tl.cdiv(rank, FOLDED) * FOLDED  # zeros from rank on: an even end for wide loads
    acc = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
    for offset in range(0, rank, BLOCK_RANKS):
        ranks = offset + tl.arange(0, BLOCK_RANKS)
        mask = live[:, None] & (ranks < written)[None, :]
        at = pairs.to(tl.int64)[:, None] * rank_stride + ranks[None, :]
        a = tl.load(inner + at, mask=mask, other=0.0)
        mask = (ranks < rank)[:, None] & inside[None, :]
        at = (start + ranks).to(tl.int64)[:, None] * width + columns[None, :]
        b = tl.load(table + at, mask=mask, other=0.0)
        acc = dot(a, b, acc)
    row = tl.load(rows + pairs, mask=live, other=0).to(tl.int64)
    mask = live[:, None] & inside[None, :]
    write_change(
        x, out, changes, acc, pairs, row, columns, mask, width, x_row_stride, x_column_stride, FUSED
    )
