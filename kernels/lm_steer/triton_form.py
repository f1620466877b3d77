"""What the Triton forms have in common: place, launch what the batch has a use for, sum up."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_steer.kernels.lm_steer import warming
from vllm_steer.kernels.lm_steer.block_sizes import BlockSizes
from vllm_steer.kernels.lm_steer.changes import Target, begin, finish
from vllm_steer.kernels.lm_steer.operands import SteeredRows, SteerTables
from vllm_steer.kernels.lm_steer.placing import PlacedRows, Tiles, place_rows


@dataclass(frozen=True)
class Batch:
    """All that one call's kernels need: the result in the making, tables, pairs, block sizes."""

    target: Target
    tables: SteerTables
    placed: PlacedRows
    sizes: BlockSizes


@dataclass(frozen=True)
class TritonForm:
    """An ``LMSteerForm``: block sizes for a bank, and how tiles of either kind are launched.

    Deterministic: no atomics, sums in fixed order, several steers of a row in ascending order of
    slot. A row's result does not depend on the other rows of its batch, nor on its place among
    them.
    """

    sizes: Callable[[SteerTables], BlockSizes]
    low_rank: Callable[[Batch, Tiles, torch.Tensor], None]
    dense: Callable[[Batch, Tiles], None]

    def place(self, steered: SteeredRows, tables: SteerTables, device: torch.device) -> PlacedRows:
        """The pairs in tiles, on the device, in one copy."""
        sizes = self.sizes(tables)
        return place_rows(
            steered,
            tables,
            device,
            rows_per_tile=sizes.rows,
            ranks_per_program=sizes.shrink_ranks,
        )

    def steer_rows(self, x: torch.Tensor, tables: SteerTables, placed: PlacedRows) -> torch.Tensor:
        """``x [T, width]`` plus the change of every pair, as a new contiguous tensor.

        ``x`` may be strided. No host synchronisation; what is allocated depends on the numbers of
        rows and pairs only.
        """
        target = begin(x, placed)
        batch = Batch(target, tables, placed, self.sizes(tables))
        if placed.low_rank is not None and placed.work is not None:
            self.low_rank(batch, placed.low_rank, placed.work)
        if placed.dense is not None:
            self.dense(batch, placed.dense)
        return finish(target, tables, placed)

    def warm_up(self, tables: SteerTables, dtype: torch.dtype) -> None:
        """Compile every kernel and variant that these tables can need for rows in ``dtype``."""
        for x, steered in warming.batches(tables, dtype):
            self.steer_rows(x, tables, self.place(steered, tables, x.device))
