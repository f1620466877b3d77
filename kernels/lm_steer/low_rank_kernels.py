"""LM-Steer's low-rank product over tiles of rows: shrink, fold, expand.

For a tile of rows ``X [m, d]`` of one slot with factors ``A, B [r, d]`` (P1^T and P2^T):

    shrink  partials_k = A[:, chunk k] X[:, chunk k]^T      split-K: chunks of the width
    fold    H = (sum_k partials_k) * scale                  in the order of k, rounded to B's dtype
    expand  change = B^T H                                  ``H [r, m]``

``scale`` is epsilon times the row's strength, or epsilon alone for fixed columns. At strength 0,
``H`` is 0 in all columns, so the change is 0 even for a row that is not finite. Products accumulate
in float32; ``H`` must lie within the dtype's range (65504 in float16), as in torch.

Weights are the first operand of every product, 64 ranks or columns as Hopper's tensor cores need
them, and rows are the second: a tile may have few rows, and missing rows cost little. The
intermediate results lie in memory by pair: ``partials [k, pair, rank]``. Chunks, tiles and the
kernel that folds depend on the bank only, so a row's result does not depend on the other rows.
"""

import triton
import triton.language as tl

from vllm_steer.kernels.lm_steer.change_kernels import write_change
from vllm_steer.kernels.lm_steer.packing import dot, load_x, summed_parts
from vllm_steer.kernels.rounding import rounded


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
    block = tl.multiple_of(tl.load(work + 2 * tl.program_id(0) + 1), BLOCK_RANKS)
    ranks = block + tl.arange(0, BLOCK_RANKS)
    weights = table + (start + ranks).to(tl.int64)[:, None] * width
    acc = tl.zeros((BLOCK_RANKS, BLOCK_ROWS), tl.float32)
    for offset in range(0, CHUNK, BLOCK_WIDTH):
        columns = chunk * CHUNK + offset + tl.arange(0, BLOCK_WIDTH)[None, :]
        inside = columns < width
        a = tl.load(weights + columns, mask=(ranks < rank)[:, None] & inside, other=0.0)
        at = row[:, None] * x_row_stride + columns * x_column_stride
        b = load_x(x, at, live[:, None] & inside, table.dtype.element_ty)
        acc = dot(a, tl.trans(b), acc)
    index = (chunk.to(tl.int64) * num_pairs + pairs)[None, :] * rank_stride + ranks[:, None]
    tl.store(partials + index, acc, mask=live[None, :])  # zeros in missing ranks


@triton.jit
def folded(
    partials,
    at,
    mask,
    step,
    scale,
    factor,
    CHUNKS: tl.constexpr,
    dtype: tl.constexpr,
):
    """``H`` of a block: the sum of the partial sums, which are ``step`` numbers apart, scaled and
    rounded.
    """
    total = tl.load(partials + at, mask=mask, other=0.0)
    for chunk in tl.static_range(1, CHUNKS):
        total += tl.load(partials + chunk * step + at, mask=mask, other=0.0)
    return rounded(tl.where(scale != 0, total * factor, 0.0), dtype)


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
    """``inner[pair, rank]``; programs ``(work item, block of the tile's rows)``."""
    tile = tl.load(work + 2 * tl.program_id(0))
    if tile < 0:
        return
    first = tl.load(bounds + 5 * tile) + tl.program_id(1) * BLOCK_ROWS
    last = tl.load(bounds + 5 * tile + 1)
    if first >= last:
        return
    start = tl.load(bounds + 5 * tile + 2)
    free = tl.load(bounds + 5 * tile + 3) - start
    pairs = first + tl.arange(0, BLOCK_ROWS)
    live = pairs < last
    block = tl.multiple_of(tl.load(work + 2 * tl.program_id(0) + 1), BLOCK_RANKS)
    ranks = block + tl.arange(0, BLOCK_RANKS)
    at = pairs.to(tl.int64)[:, None] * rank_stride + ranks[None, :]
    step = num_pairs.to(tl.int64) * rank_stride
    scale = tl.load(scales + pairs, mask=live, other=0.0)[:, None]
    factor = tl.where((ranks < free)[None, :], scale, tl.load(epsilons + tile))
    dtype = inner.dtype.element_ty
    mask = live[:, None]
    tl.store(inner + at, folded(partials, at, mask, step, scale, factor, CHUNKS, dtype), mask=mask)


@triton.jit(do_not_specialize=["num_pairs"])
def expand(
    x,
    inner,
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
    WRITTEN: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """The change of a tile's rows; programs ``(tile, block of the width)``.

    ``inner`` is the output of fold if CHUNKS is 0, else that of shrink. A block of the width is
    multiplied with PARTS blocks of ranks at once (``packing``).
    """
    tile = tl.program_id(0)
    first = tl.load(bounds + 5 * tile)
    if first < 0:
        return
    last = tl.load(bounds + 5 * tile + 1)
    start = tl.load(bounds + 5 * tile + 2)
    free = tl.load(bounds + 5 * tile + 3) - start
    rank = tl.load(bounds + 5 * tile + 4) - start
    epsilon = tl.load(epsilons + tile)
    written = tl.cdiv(rank, WRITTEN) * WRITTEN  # zeros from rank on: an aligned end for wide loads
    step = num_pairs.to(tl.int64) * rank_stride

    m = tl.arange(0, PARTS * BLOCK_WIDTH)
    columns = tl.program_id(1) * BLOCK_WIDTH + m % BLOCK_WIDTH
    inside = columns < width
    n = tl.arange(0, PARTS * BLOCK_ROWS)
    pair = first + n % BLOCK_ROWS
    live = (pair < last)[:, None]
    scale = tl.load(scales + pair, mask=pair < last, other=0.0)[:, None]
    k = tl.arange(0, BLOCK_RANKS)
    acc = tl.zeros((PARTS * BLOCK_WIDTH, PARTS * BLOCK_ROWS), tl.float32)
    for offset in range(0, rank, PARTS * BLOCK_RANKS):
        ranks = offset + k[:, None] + (m // BLOCK_WIDTH * BLOCK_RANKS)[None, :]
        at = (start + ranks).to(tl.int64) * width + columns[None, :]
        a = tl.load(table + at, mask=(ranks < rank) & inside[None, :], other=0.0)
        ranks = offset + (n // BLOCK_ROWS * BLOCK_RANKS)[:, None] + k[None, :]
        at = pair.to(tl.int64)[:, None] * rank_stride + ranks
        mask = live & (ranks < written)
        if CHUNKS == 0:
            b = tl.load(inner + at, mask=mask, other=0.0)
        else:
            factor = tl.where(ranks < free, scale, epsilon)
            b = folded(inner, at, mask, step, scale, factor, CHUNKS, table.dtype.element_ty)
        acc = dot(tl.trans(a), tl.trans(b), acc)
    change = tl.trans(summed_parts(acc, PARTS, BLOCK_WIDTH, BLOCK_ROWS))
    columns = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    pairs = first + tl.arange(0, BLOCK_ROWS)
    live = pairs < last
    row = tl.load(rows + pairs, mask=live, other=0).to(tl.int64)
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
