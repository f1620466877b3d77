"""The common part of the Triton backends: prepare a batch, launch its kernels, sum the changes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_steer.kernels.lm_steer import warm_up
from vllm_steer.kernels.lm_steer.block_sizes import BlockSizes
from vllm_steer.kernels.lm_steer.changes import ResultBuffers, add_changes, allocate
from vllm_steer.kernels.lm_steer.metadata import (
    BatchMetadata,
    RowBuffers,
    Tiles,
    batch_metadata,
    first_rows,
    row_buffers,
    write_rows,
)
from vllm_steer.kernels.lm_steer.operands import SteeredRows, SteerWeights


@dataclass(frozen=True)
class KernelArguments:
    """The arguments of one call's kernels: result buffers, weights, metadata, block sizes."""

    target: ResultBuffers
    weights: SteerWeights
    metadata: BatchMetadata
    sizes: BlockSizes


@dataclass(frozen=True)
class TritonBackend:
    """An ``LMSteerBackend``: block sizes for a bank, and how tiles of either kind are launched.

    Deterministic: no atomics, sums in fixed order, several steers of a row in ascending order of
    slot. A row's result does not depend on the other rows of its batch, nor on its place among
    them.
    """

    sizes: Callable[[SteerWeights], BlockSizes]
    low_rank: Callable[[KernelArguments, Tiles, torch.Tensor], None]
    dense: Callable[[KernelArguments, Tiles], None]

    def prepare(
        self, steered: SteeredRows, weights: SteerWeights, device: torch.device
    ) -> BatchMetadata:
        """The pairs in tiles, on the device, in one copy."""
        sizes = self.sizes(weights)
        return batch_metadata(
            steered,
            weights,
            device,
            rows_per_tile=sizes.rows,
            ranks_per_program=sizes.shrink_ranks,
        )

    def row_buffers(
        self, slot_of_pair: torch.Tensor, weights: SteerWeights, pairs_per_row: int
    ) -> RowBuffers:
        """Buffers for ``slot_of_pair [N * pairs_per_row]``, see ``RowBuffers``."""
        return row_buffers(
            slot_of_pair.shape[0] // pairs_per_row,
            pairs_per_row,
            max_rank=weights.columns.max_rank,
            ranks_per_program=self.sizes(weights).shrink_ranks,
            device=slot_of_pair.device,
        )

    def write_rows(
        self,
        buffers: RowBuffers,
        slot_of_pair: torch.Tensor,
        slots: torch.Tensor,
        num_rows: int,
    ) -> None:
        """Write the slots of the first ``num_rows`` rows into the buffers."""
        write_rows(buffers, slot_of_pair, slots, num_rows)

    def first_rows(self, buffers: RowBuffers, scales: torch.Tensor, num_rows: int) -> BatchMetadata:
        """The metadata of the first rows, in a CUDA graph too."""
        return first_rows(buffers, scales, num_rows)

    def steer_rows(
        self, x: torch.Tensor, weights: SteerWeights, metadata: BatchMetadata
    ) -> torch.Tensor:
        """``x [T, width]`` plus the change of every pair, as a new contiguous tensor.

        ``x`` may be strided. No host synchronisation; what is allocated depends on the numbers of
        rows and pairs only.
        """
        target = allocate(x, metadata)
        batch = KernelArguments(target, weights, metadata, self.sizes(weights))
        if metadata.low_rank is not None and metadata.work is not None:
            self.low_rank(batch, metadata.low_rank, metadata.work)
        if metadata.dense is not None:
            self.dense(batch, metadata.dense)
        return add_changes(target, weights, metadata)

    def warm_up(self, weights: SteerWeights, dtype: torch.dtype) -> None:
        """Compile every kernel and variant that these weights can need for rows in ``dtype``."""
        for x, steered in warm_up.batches(weights, dtype):
            self.steer_rows(x, weights, self.prepare(steered, weights, x.device))
