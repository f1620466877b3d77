"""The common part of the Triton backends: prepare a batch, launch its kernels, sum the changes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_steer.kernels.lm_steer import warm_up
from vllm_steer.kernels.lm_steer.block_sizes import BlockSizes
from vllm_steer.kernels.lm_steer.changes import ResultBuffers, add_changes, allocate
from vllm_steer.kernels.lm_steer.metadata import (
    BatchMetadata,
    Tiles,
    batch_metadata,
    row_metadata,
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

    def prepare_rows(
        self,
        slot_of_row: torch.Tensor,
        scales: torch.Tensor,
        slots: torch.Tensor,
        weights: SteerWeights,
    ) -> BatchMetadata:
        """``row_metadata`` for these weights: made on the device, in a CUDA graph too."""
        return row_metadata(
            slot_of_row,
            scales,
            slots,
            max_rank=weights.columns.max_rank,
            ranks_per_program=self.sizes(weights).shrink_ranks,
        )

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
