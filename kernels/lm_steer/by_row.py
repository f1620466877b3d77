"""The LM-Steer operation in Triton, with programs of one row: for engines of a few rows.

Equations: ``operands``. Every pair of row and steer has its own programs, which read the steer's
weights for it alone.
"""

import torch
import triton

from vllm_steer.kernels.lm_steer.block_sizes import BlockSizes, row_sizes
from vllm_steer.kernels.lm_steer.changes import EXACT
from vllm_steer.kernels.lm_steer.operands import SteerTables
from vllm_steer.kernels.lm_steer.placing import Tiles
from vllm_steer.kernels.lm_steer.row_kernels import dense_row, expand_row, shrink_row
from vllm_steer.kernels.lm_steer.triton_form import Batch, TritonForm


def _low_rank(batch: Batch, tiles: Tiles, work: torch.Tensor) -> None:
    target, tables, placed, sizes = batch.target, batch.tables, batch.placed, batch.sizes
    x, width, pairs = target.x, target.width, placed.rows.shape[0]
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


def _dense(batch: Batch, tiles: Tiles) -> None:
    target, tables, placed, sizes = batch.target, batch.tables, batch.placed, batch.sizes
    x, width = target.x, target.width
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


BY_ROW = TritonForm(_sizes, _low_rank, _dense)
