"""LM-Steer in Triton with one program per row: for engines of a few rows.

Equations: ``operands``. Every pair of row and steer has its own programs, which read the steer's
weights for it alone.
"""

import torch
import triton

from vllm_steer.kernels.lm_steer.block_sizes import BlockSizes, row_sizes
from vllm_steer.kernels.lm_steer.changes import EXACT
from vllm_steer.kernels.lm_steer.metadata import Tiles
from vllm_steer.kernels.lm_steer.operands import SteerWeights
from vllm_steer.kernels.lm_steer.row_kernels import dense_row, expand_row, shrink_row
from vllm_steer.kernels.lm_steer.triton_backend import KernelArguments, TritonBackend


def _low_rank(batch: KernelArguments, tiles: Tiles, work: torch.Tensor) -> None:
    target, weights, metadata, sizes = batch.target, batch.weights, batch.metadata, batch.sizes
    x, width, pairs = target.x, target.width, metadata.rows.shape[0]
    rank_stride = weights.columns.rank_stride
    partials = torch.empty(sizes.chunks, pairs, rank_stride, dtype=torch.float32, device=x.device)
    shrink_row[(work.shape[0], sizes.chunks)](
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
        BLOCK_RANKS=sizes.shrink_ranks,
        BLOCK_WIDTH=sizes.shrink_width,
        **EXACT,
    )
    expand_row[(tiles.bounds.shape[0], triton.cdiv(width, sizes.expand_width))](
        x,
        partials,
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
        CHUNKS=sizes.chunks,
        BLOCK_RANKS=sizes.expand_ranks,
        BLOCK_WIDTH=sizes.expand_width,
        num_warps=8,
        **EXACT,
    )


def _dense(batch: KernelArguments, tiles: Tiles) -> None:
    target, weights, metadata, sizes = batch.target, batch.weights, batch.metadata, batch.sizes
    x, width = target.x, target.width
    dense_row[(tiles.bounds.shape[0], triton.cdiv(width, sizes.dense_out))](
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
        BLOCK_OUT=sizes.dense_out,
        BLOCK_IN=sizes.dense_in,
        **EXACT,
    )


def _sizes(weights: SteerWeights) -> BlockSizes:
    return row_sizes(weights.width, weights.columns.max_rank)


ROWWISE = TritonBackend(_sizes, _low_rank, _dense)
