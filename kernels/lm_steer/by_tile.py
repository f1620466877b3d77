"""The LM-Steer operation in Triton, over tiles of rows that share a steer.

Equations: ``operands``. A steer's weights are read once per tile of rows and step.
"""

import torch
import triton

from vllm_steer.kernels.lm_steer.block_sizes import BlockSizes, tile_sizes
from vllm_steer.kernels.lm_steer.changes import EXACT
from vllm_steer.kernels.lm_steer.dense_kernels import dense
from vllm_steer.kernels.lm_steer.low_rank_kernels import expand, fold, shrink
from vllm_steer.kernels.lm_steer.operands import SteerTables
from vllm_steer.kernels.lm_steer.placing import Tiles
from vllm_steer.kernels.lm_steer.triton_form import Batch, TritonForm


def _low_rank(batch: Batch, tiles: Tiles, work: torch.Tensor) -> None:
    target, tables, placed, sizes = batch.target, batch.tables, batch.placed, batch.sizes
    x, width, pairs = target.x, target.width, placed.rows.shape[0]
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


def _dense(batch: Batch, tiles: Tiles) -> None:
    target, tables, placed, sizes = batch.target, batch.tables, batch.placed, batch.sizes
    x, width = target.x, target.width
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


BY_TILE = TritonForm(_sizes, _low_rank, _dense)
