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
    has_idle_pairs   some pairs have no tile: their changes are zero
    """

    rows: torch.Tensor
    scales: torch.Tensor
    low_rank: Tiles | None
    work: torch.Tensor | None
    dense: Tiles | None
    constant: Tiles | None
    sums: RowSums | None
    touched: int
    has_idle_pairs: bool = False


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


@dataclass(frozen=True, eq=False)
class RowBuffers:
    """Metadata of up to N rows with K pairs each, whether they have a slot or not, in buffers.

    Pair ``t * K + k`` belongs to row ``t`` and is a tile of its own; ``bounds [N * K, 5]`` and
    ``work [N * K, blocks, 2]`` are negative where it has no slot, ``touched [N]`` where none of a
    row's pairs has. ``rows``, ``order [N * K]`` and ``starts [N + 1]`` never change.
    """

    pairs_per_row: int
    rows: torch.Tensor
    bounds: torch.Tensor
    epsilons: torch.Tensor
    work: torch.Tensor
    touched: torch.Tensor
    starts: torch.Tensor
    order: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Device memory of all buffers."""
        tensors = (self.rows, self.bounds, self.epsilons, self.work, self.touched, self.order)
        return sum(tensor.nbytes for tensor in tensors)


def row_buffers(
    num_rows: int,
    pairs_per_row: int,
    *,
    max_rank: int,
    ranks_per_program: int,
    device: torch.device,
) -> RowBuffers:
    """Buffers without any slot; ``write_rows`` fills them."""
    num_pairs = num_rows * pairs_per_row
    pairs = torch.arange(num_pairs, dtype=torch.int32, device=device)
    first_rank = torch.arange(0, max_rank, ranks_per_program, dtype=torch.int32, device=device)
    work = torch.full((num_pairs, len(first_rank), 2), -1, dtype=torch.int32, device=device)
    work[:, :, 1] = first_rank
    starts = torch.arange(num_rows + 1, dtype=torch.int32, device=device) * pairs_per_row
    return RowBuffers(
        pairs_per_row=pairs_per_row,
        rows=pairs // pairs_per_row,
        bounds=torch.full((num_pairs, 5), -1, dtype=torch.int32, device=device),
        epsilons=torch.ones(num_pairs, device=device),
        work=work,
        touched=torch.full((num_rows,), -1, dtype=torch.int32, device=device),
        starts=starts,
        order=pairs,
    )


def write_rows(
    buffers: RowBuffers, slot_of_pair: torch.Tensor, slots: torch.Tensor, num_rows: int
) -> None:
    """Write the slots of the first ``num_rows`` rows; nothing waits for the device.

    ``slot_of_pair`` ``[N * K]`` is -1 for none, ``slots`` ``[S, 3]`` int32 are the start, fixed and
    end of each slot.
    """
    num_pairs = num_rows * buffers.pairs_per_row
    slot, pairs = slot_of_pair[:num_pairs], buffers.order[:num_pairs]
    has_slot = slot >= 0
    tile = torch.where(has_slot, pairs, -1)
    bounds = buffers.bounds[:num_pairs]
    bounds[:, 0] = tile
    bounds[:, 1] = pairs + 1
    bounds[:, 2:] = slots[slot.clamp_min(0)]
    buffers.work[:num_pairs, :, 0] = tile[:, None]
    has_any = has_slot.view(num_rows, -1).any(1)
    buffers.touched[:num_rows] = torch.where(
        has_any, buffers.rows[:num_pairs][:: buffers.pairs_per_row], -1
    )


def first_rows(buffers: RowBuffers, scales: torch.Tensor, num_rows: int) -> BatchMetadata:
    """The metadata of the first rows under ``scales``, one per pair: views, for a CUDA graph."""
    num_pairs = num_rows * buffers.pairs_per_row
    return BatchMetadata(
        rows=buffers.rows[:num_pairs],
        scales=scales,
        low_rank=Tiles(buffers.bounds[:num_pairs], buffers.epsilons[:num_pairs]),
        work=buffers.work[:num_pairs].view(-1, 2),
        dense=None,
        constant=None,
        sums=RowSums(
            buffers.touched[:num_rows], buffers.starts[: num_rows + 1], buffers.order[:num_pairs]
        ),
        touched=0,
        has_idle_pairs=True,
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
