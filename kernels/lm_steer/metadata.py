"""The metadata of a batch that the Triton kernels read, made on the host and copied once.

A *tile* is up to ``rows_per_tile`` pairs of one slot, so its programs read the slot's weights once
for all of them. Kernels return at a tile or row whose first number is negative, so tensors may be
padded: buffers of a fixed size for a CUDA graph.
"""

from dataclasses import dataclass

import numpy as np
import torch

from vllm_steer.kernels.lm_steer.operands import IntArray, SteeredRows, SteerWeights
from vllm_steer.kernels.upload import upload


@dataclass(frozen=True, eq=False)
class Tiles:
    """Tiles of slots of one kind; ``first:last`` are the tile's pairs.

    bounds    ``[N, 5]`` int32: first, last, then the slot's three numbers: start, fixed and end of
              its ranks (``LowRank``), or its free and fixed matrix or vector and 0; -1: not there
    epsilons  ``[N]`` float32
    """

    bounds: torch.Tensor
    epsilons: torch.Tensor


@dataclass(frozen=True, eq=False)
class RowSums:
    """Which pairs are added to each of the U touched rows: ``order[starts[u]:starts[u + 1]]``.

    rows    ``[U]`` int32
    starts  ``[U + 1]`` int32
    order   ``[P]`` int32, pairs by row, then by slot: the fixed order of the sum
    """

    rows: torch.Tensor
    starts: torch.Tensor
    order: torch.Tensor


@dataclass(frozen=True, eq=False)
class BatchMetadata:
    """P pairs on the device; parts that the batch does not need are None.

    rows      ``[P]`` int32, the row of each pair
    scales    ``[P]`` float32, epsilon times strength; may be overwritten
    low_rank  tiles of ``LowRank`` slots
    work      ``[W, 2]`` int32: a low-rank tile and the first of the ranks that one program shrinks
    dense     tiles of ``Dense`` slots
    constant  tiles of one pair each, of ``Constant`` slots
    sums      None if no row has more than one pair: its change is added where it is made
    touched   number of rows with a pair, on the host
    """

    rows: torch.Tensor
    scales: torch.Tensor
    low_rank: Tiles | None
    work: torch.Tensor | None
    dense: Tiles | None
    constant: Tiles | None
    sums: RowSums | None
    touched: int


def batch_metadata(
    steered: SteeredRows,
    weights: SteerWeights,
    device: torch.device,
    *,
    rows_per_tile: int,
    ranks_per_program: int,
) -> BatchMetadata:
    """The metadata of a batch. No loop over rows or steers on the host."""
    groups = np.array(steered.groups, dtype=np.int64).reshape(-1, 3)
    kinds = weights.columns.kinds[groups[:, 0]]
    low_rank, dense, constant = (
        _tiles(groups[kinds == kind], weights, size)
        for kind, size in enumerate((rows_per_tile, rows_per_tile, 1))
    )
    counts = np.bincount(steered.rows) if steered.rows.size else np.zeros(1, dtype=np.int64)
    arrays = [
        steered.rows.astype(np.int32),
        steered.scales,
        *low_rank,
        _work(low_rank[0], ranks_per_program),
        *dense,
        *constant,
    ]
    single = bool(counts.max() <= 1)
    rows, scales, *parts = upload(
        arrays if single else arrays + _sums(steered.rows, counts), device
    )
    return BatchMetadata(
        rows=rows,
        scales=scales,
        low_rank=_filled(parts[0:2]),
        work=parts[2] if parts[2].numel() else None,
        dense=_filled(parts[3:5]),
        constant=_filled(parts[5:7]),
        sums=None if single else RowSums(*parts[7:]),
        touched=int(np.count_nonzero(counts)),
    )


def row_metadata(
    slot_of_row: torch.Tensor,
    scales: torch.Tensor,
    slots: torch.Tensor,
    *,
    max_rank: int,
    ranks_per_program: int,
) -> BatchMetadata:
    """The metadata of T rows with at most one low-rank slot each, made on the device.

    ``slot_of_row`` ``[T]`` is -1 for none, ``scales`` ``[T]`` float32, ``slots`` ``[S, 3]`` int32
    their start, fixed and end. Shapes depend on T alone and nothing waits for the device: the call
    can be captured in a CUDA graph. Every row is a tile of its own.
    """
    num_rows, device = slot_of_row.shape[0], slot_of_row.device
    rows = torch.arange(num_rows, dtype=torch.int32, device=device)
    is_active = (slot_of_row >= 0) & (scales != 0)
    pair = torch.where(is_active, rows, -1)
    bounds = torch.cat([pair[:, None], rows[:, None] + 1, slots[slot_of_row.clamp_min(0)]], dim=1)
    blocks = -(-max_rank // ranks_per_program)
    first_rank = torch.arange(blocks, dtype=torch.int32, device=device) * ranks_per_program
    work = torch.stack([pair[:, None].expand(-1, blocks), first_rank.expand(num_rows, -1)], dim=2)
    return BatchMetadata(
        rows=rows,
        scales=scales,
        low_rank=Tiles(bounds.contiguous(), torch.ones_like(scales)),
        work=work.reshape(-1, 2).contiguous(),
        dense=None,
        constant=None,
        sums=None,
        touched=0,
    )


def _tiles(groups: IntArray, weights: SteerWeights, size: int) -> list[np.ndarray]:
    """Bounds and epsilons of the tiles of some groups, in the order of their slots."""
    if not len(groups):
        return [np.empty((0, 5), dtype=np.int32), np.empty(0, dtype=np.float32)]
    slots, starts, ends = groups.T
    tiles = -(-(ends - starts) // size)
    nth = np.arange(tiles.sum()) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    first = np.repeat(starts, tiles) + nth * size
    last = np.minimum(first + size, np.repeat(ends, tiles))
    slot = np.repeat(slots, tiles)
    bounds = np.column_stack([first, last, weights.columns.bounds[slot]])
    return [bounds.astype(np.int32), weights.columns.epsilons[slot]]


def _work(bounds: np.ndarray, ranks: int) -> np.ndarray:
    """``(tile, first rank)`` of each program, tiles with the same weights next to each other."""
    if not len(bounds):
        return np.empty((0, 2), dtype=np.int32)
    starts, ends = bounds[:, 2].astype(np.int64), bounds[:, 4].astype(np.int64)
    blocks = -(-(ends - starts) // ranks)
    tile = np.repeat(np.arange(len(bounds)), blocks)
    block = np.arange(blocks.sum()) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    order = np.lexsort((tile, block, starts[tile]))
    items: np.ndarray = np.column_stack([tile, block * ranks])[order]
    return items.astype(np.int32)


def _sums(rows: IntArray, counts: IntArray) -> list[np.ndarray]:
    touched = np.flatnonzero(counts)
    starts = np.cumsum([0, *counts[touched]])
    order = np.argsort(rows, kind="stable")
    return [array.astype(np.int32) for array in (touched, starts, order)]


def _filled(parts: list[torch.Tensor]) -> Tiles | None:
    bounds, epsilons = parts
    return Tiles(bounds, epsilons) if bounds.numel() else None
