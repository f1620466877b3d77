"""The interface of a backend of the LM-Steer operation."""

from typing import Any, Protocol, runtime_checkable

import torch

from vllm_steer.kernels.lm_steer.operands import SteeredRows, SteerWeights


class LMSteerBackend(Protocol):
    """A module or an object; ``prepare`` runs once per composition of a batch."""

    def prepare(self, steered: SteeredRows, weights: SteerWeights, device: torch.device) -> Any:
        """The batch's metadata for ``steer_rows``, on the device, in one copy.

        Its ``scales`` is a float32 tensor ``[P]`` on the device, in the order of the pairs. It may
        be overwritten on the device between calls of ``steer_rows``, which reads it at each call;
        a pair whose scale is 0 changes nothing. It shares no memory with ``steered``.
        """

    def steer_rows(self, x: torch.Tensor, weights: SteerWeights, metadata: Any) -> torch.Tensor:
        """``x [T, width]`` plus the change of every pair, as a new tensor."""

    def warm_up(self, weights: SteerWeights, dtype: torch.dtype) -> None:
        """Compile whatever a batch of rows in ``dtype`` can call, on the weights' device."""


@runtime_checkable
class GraphLMSteerBackend(LMSteerBackend, Protocol):
    """A backend that has metadata of low-rank slots in buffers that keep their addresses."""

    def row_buffers(
        self, slot_of_pair: torch.Tensor, weights: SteerWeights, pairs_per_row: int
    ) -> Any:
        """Buffers of the metadata for ``slot_of_pair [N * pairs_per_row]`` int32, without slots."""

    def write_rows(
        self, buffers: Any, slot_of_pair: torch.Tensor, slots: torch.Tensor, num_rows: int
    ) -> None:
        """Write the slots of the first ``num_rows`` rows, -1 for none, without a synchronisation.

        ``slots`` ``[S, 3]`` int32 are the start, fixed and end of each slot.
        """

    def first_rows(self, buffers: Any, scales: torch.Tensor, num_rows: int) -> Any:
        """The metadata of the first rows for ``steer_rows``: views that a graph may keep."""
