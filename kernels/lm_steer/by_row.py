"""The LM-Steer operation in Triton, with programs of one row: for engines of a few rows.

Equations: ``operands``. Every pair of row and steer has its own programs, which read the steer's
weights for it alone. Deterministic, and a row's result depends on no other row.
"""

import torch
import triton

from vllm_steer.kernels.lm_steer import warming
from vllm_steer.kernels.lm_steer.block_sizes import BlockSizes, row_sizes
from vllm_steer.kernels.lm_steer.changes import EXACT, Target, begin, finish
from vllm_steer.kernels.lm_steer.operands import SteeredRows, SteerTables
from vllm_steer.kernels.lm_steer.placing import PlacedRows, place_rows
from vllm_steer.kernels.lm_steer.row_kernels import dense_row, expand_row, shrink_row


def place(steered: SteeredRows, tables: SteerTables, device: torch.device) -> PlacedRows:
    """The pairs as tiles of one, on the device, in one copy."""
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
    shrink_row[(work.shape[0], sizes.chunks)](
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
        BLOCK_RANKS=sizes.shrink_ranks,
        BLOCK_WIDTH=sizes.shrink_width,
        **EXACT,
    )
    expand_row[(tiles.bounds.shape[0], triton.cdiv(width, sizes.expand_width))](
        x,
        partials,
        tables.expand,
        placed.rows,
        placed.scales,
        tiles.bounds,
        tiles.epsilons,
        target.out,
        target.changes,
        pairs,
        width,
        rank_stride,
        *x.stride(),
        FUSED=target.fused,
        CHUNKS=sizes.chunks,
        BLOCK_RANKS=sizes.expand_ranks,
        BLOCK_WIDTH=sizes.expand_width,
        num_warps=8,
        **EXACT,
    )


def _dense(target: Target, tables: SteerTables, placed: PlacedRows, sizes: BlockSizes) -> None:
    assert placed.dense is not None
    x, width, tiles = target.x, target.width, placed.dense
    dense_row[(tiles.bounds.shape[0], triton.cdiv(width, sizes.dense_out))](
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
        BLOCK_OUT=sizes.dense_out,
        BLOCK_IN=sizes.dense_in,
        **EXACT,
    )


def _sizes(tables: SteerTables) -> BlockSizes:
    return row_sizes(tables.width, tables.columns.max_rank)
