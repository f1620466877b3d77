"""The LM-Steer operation in Triton, over tiles of rows that share a steer.

Equations: ``operands``. A steer's weights are read once per tile of rows and step. Deterministic:
no atomics, sums in fixed order, several steers of a row in ascending order of slot. A row's result
does not depend on the other rows of its batch, nor on its place among them.
"""

import torch
import triton

from vllm_steer.kernels.lm_steer import warming
from vllm_steer.kernels.lm_steer.block_sizes import BlockSizes, tile_sizes
from vllm_steer.kernels.lm_steer.changes import EXACT, Target, begin, finish
from vllm_steer.kernels.lm_steer.dense_kernels import dense
from vllm_steer.kernels.lm_steer.low_rank_kernels import expand, fold, shrink
from vllm_steer.kernels.lm_steer.operands import SteeredRows, SteerTables
from vllm_steer.kernels.lm_steer.placing import PlacedRows, place_rows


def place(steered: SteeredRows, tables: SteerTables, device: torch.device) -> PlacedRows:
    """The pairs in tiles, on the device, in one copy."""
    sizes = _sizes(tables)
    return place_rows(
        steered, tables, device, rows_per_tile=sizes.rows, ranks_per_program=sizes.shrink_ranks
    )


def warm_up(tables: SteerTables, dtype: torch.dtype) -> None:
    """Compile every kernel and variant that these tables can need for rows in ``dtype``."""
    for x, steered in warming.batches(tables, dtype):
        steer_rows(x, tables, place(steered, tables, x.device))


def steer_rows(x: torch.Tensor, tables: SteerTables, placed: PlacedRows) -> torch.Tensor:
    """``x [T, width]`` plus the change of every pair, as a new contiguous tensor.

    ``x`` may be strided. No host synchronisation; what is allocated depends on the numbers of rows
    and pairs only.
    """
    target = begin(x, placed)
    if placed.low_rank is not None:
        _low_rank(target, tables, placed, _sizes(tables))
    if placed.dense is not None:
        _dense(target, tables, placed, _sizes(tables))
    return finish(target, tables, placed)


def _low_rank(target: Target, tables: SteerTables, placed: PlacedRows, sizes: BlockSizes) -> None:
    assert placed.low_rank is not None and placed.work is not None
    x, width = target.x, target.width
    tiles, work, pairs = placed.low_rank, placed.work, placed.rows.shape[0]
    rank_stride = tables.columns.rank_stride
    partials = torch.empty(sizes.chunks, pairs, rank_stride, dtype=torch.float32, device=x.device)
    shrink[(work.shape[0], sizes.chunks)](
        x,
        tables.shrink,
        placed.rows,
        tiles.bounds,
        work,
        partials,
        pairs,
        width,
        rank_stride,
        *x.stride(),
        CHUNK=sizes.chunk,
        BLOCK_ROWS=sizes.rows,
        BLOCK_RANKS=sizes.shrink_ranks,
        BLOCK_WIDTH=sizes.shrink_width,
        num_stages=sizes.stages,
        **EXACT,
    )
    inner = torch.empty(pairs, rank_stride, dtype=tables.dtype, device=x.device)
    fold[(work.shape[0],)](
        partials,
        placed.scales,
        tiles.bounds,
        tiles.epsilons,
        work,
        inner,
        pairs,
        rank_stride,
        CHUNKS=sizes.chunks,
        BLOCK_ROWS=sizes.rows,
        BLOCK_RANKS=sizes.shrink_ranks,
        **EXACT,
    )
    expand[(tiles.bounds.shape[0], triton.cdiv(width, sizes.expand_width))](
        x,
        inner,
        tables.expand,
        placed.rows,
        tiles.bounds,
        target.out,
        target.changes,
        width,
        rank_stride,
        *x.stride(),
        FUSED=target.fused,
        FOLDED=sizes.shrink_ranks,
        BLOCK_ROWS=sizes.rows,
        BLOCK_RANKS=sizes.expand_ranks,
        BLOCK_WIDTH=sizes.expand_width,
        num_stages=sizes.stages,
        **EXACT,
    )


def _dense(target: Target, tables: SteerTables, placed: PlacedRows, sizes: BlockSizes) -> None:
    assert placed.dense is not None
    x, width, tiles = target.x, target.width, placed.dense
    dense[(tiles.bounds.shape[0], triton.cdiv(width, sizes.dense_out))](
        x,
        tables.dense,
        placed.rows,
        placed.scales,
        tiles.bounds,
        tiles.epsilons,
        target.out,
        target.changes,
        width,
        *x.stride(),
        FUSED=target.fused,
        BLOCK_ROWS=sizes.rows,
        BLOCK_OUT=sizes.dense_out,
        BLOCK_IN=sizes.dense_in,
        num_stages=sizes.stages,
        **EXACT,
    )


def _sizes(tables: SteerTables) -> BlockSizes:
    return tile_sizes(tables.width, tables.columns.max_rank, tables.dtype.itemsize)
