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

FOLD_ROWS = 8
"""Rows that one program folds: few, so that all partial sums of these are read at once."""


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
        num_stages=sizes.shrink_stages,
        **EXACT,
    )
    inner = partials if sizes.expand_folds else _folded(batch, tiles, work, partials)
    expand[(tiles.bounds.shape[0], triton.cdiv(width, sizes.expand_width))](
        x,
        inner,
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
        CHUNKS=sizes.chunks if sizes.expand_folds else 0,
        WRITTEN=sizes.shrink_ranks,
        PARTS=sizes.expand_parts,
        BLOCK_ROWS=sizes.rows,
        BLOCK_RANKS=sizes.expand_ranks,
        BLOCK_WIDTH=sizes.expand_width,
        num_stages=sizes.expand_stages,
        **EXACT,
    )


def _folded(batch: Batch, tiles: Tiles, work: torch.Tensor, partials: torch.Tensor) -> torch.Tensor:
    """What is between the factors, ``[pairs, rank_stride]`` in the tables' dtype."""
    tables, sizes, (_, pairs, rank_stride) = batch.tables, batch.sizes, partials.shape
    inner = torch.empty(pairs, rank_stride, dtype=tables.dtype, device=partials.device)
    fold[(work.shape[0], triton.cdiv(sizes.rows, FOLD_ROWS))](
        partials,
        batch.placed.scales,
        tiles.bounds,
        tiles.epsilons,
        work,
        inner,
        pairs,
        rank_stride,
        CHUNKS=sizes.chunks,
        BLOCK_ROWS=FOLD_ROWS,
        BLOCK_RANKS=sizes.shrink_ranks,
        **EXACT,
    )
    return inner


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
        PARTS=sizes.dense_parts,
        BLOCK_ROWS=sizes.rows,
        BLOCK_OUT=sizes.dense_out,
        BLOCK_IN=sizes.dense_in,
        num_stages=sizes.dense_stages,
        **EXACT,
    )


def tiled(**varied: int) -> TritonForm:
    """The form, with some choices of ``tile_sizes`` varied: by benchmarks, never by an engine."""

    def sizes(tables: SteerTables) -> BlockSizes:
        rank, itemsize = tables.columns.max_rank, tables.dtype.itemsize
        return tile_sizes(tables.width, rank, itemsize, **varied)

    return TritonForm(sizes, _low_rank, _dense)


BY_TILE = tiled()
