"""LM-Steer in Triton over tiles of rows that share a steer.

Equations: ``operands``. A steer's weights are read once per tile of rows and step.
"""

import torch
import triton

from vllm_steer.kernels.lm_steer.block_sizes import BlockSizes, tile_sizes
from vllm_steer.kernels.lm_steer.changes import EXACT
from vllm_steer.kernels.lm_steer.dense_kernels import dense
from vllm_steer.kernels.lm_steer.low_rank_kernels import expand, fold, shrink
from vllm_steer.kernels.lm_steer.metadata import Tiles
from vllm_steer.kernels.lm_steer.operands import SteerWeights
from vllm_steer.kernels.lm_steer.triton_backend import KernelArguments, TritonBackend

FOLD_ROWS = 8
"""Rows that one program folds: few, so that all partial sums of these are read at once."""


def _low_rank(batch: KernelArguments, tiles: Tiles, work: torch.Tensor) -> None:
    target, weights, metadata, sizes = batch.target, batch.weights, batch.metadata, batch.sizes
    x, width, pairs = target.x, target.width, metadata.rows.shape[0]
    rank_stride = weights.columns.rank_stride
    partials = torch.empty(sizes.chunks, pairs, rank_stride, dtype=torch.float32, device=x.device)
    shrink[(work.shape[0], sizes.chunks)](
        x,
        weights.shrink,
        metadata.rows,
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
        weights.expand,
        metadata.rows,
        metadata.scales,
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


def _folded(
    batch: KernelArguments, tiles: Tiles, work: torch.Tensor, partials: torch.Tensor
) -> torch.Tensor:
    """What is between the factors, ``[pairs, rank_stride]`` in the weights' dtype."""
    weights, sizes, (_, pairs, rank_stride) = batch.weights, batch.sizes, partials.shape
    inner = torch.empty(pairs, rank_stride, dtype=weights.dtype, device=partials.device)
    fold[(work.shape[0], triton.cdiv(sizes.rows, FOLD_ROWS))](
        partials,
        batch.metadata.scales,
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


def _dense(batch: KernelArguments, tiles: Tiles) -> None:
    target, weights, metadata, sizes = batch.target, batch.weights, batch.metadata, batch.sizes
    x, width = target.x, target.width
    dense[(tiles.bounds.shape[0], triton.cdiv(width, sizes.dense_out))](
        x,
        weights.dense,
        metadata.rows,
        metadata.scales,
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


def tiled(**varied: int) -> TritonBackend:
    """The backend, with some choices of ``tile_sizes`` varied; for benchmarks."""

    def sizes(weights: SteerWeights) -> BlockSizes:
        rank, itemsize = weights.columns.max_rank, weights.dtype.itemsize
        return tile_sizes(weights.width, rank, itemsize, **varied)

    return TritonBackend(sizes, _low_rank, _dense)


TILED = tiled()
