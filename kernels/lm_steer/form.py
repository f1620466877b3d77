"""What every form of the LM-Steer operation offers."""

from typing import Any, Protocol

import torch

from vllm_steer.kernels.lm_steer.operands import SteeredRows, SteerTables


class LMSteerForm(Protocol):
    """A module or an object; ``place`` runs once per composition of a batch."""

    def place(self, steered: SteeredRows, tables: SteerTables, device: torch.device) -> Any:
        """What ``steer_rows`` needs of the pairs, on the device, in one copy.

        Its ``scales`` is a float32 tensor ``[P]`` on the device, in the order of the pairs. It may
        be written to between calls of ``steer_rows``, there and without waiting, which then takes
        what it holds: a pair whose scale is 0 changes nothing. ``steered`` shares no memory with
        it.
        """

    def steer_rows(self, x: torch.Tensor, tables: SteerTables, placed: Any) -> torch.Tensor:
        """``x [T, width]`` plus the change of every pair, as a new tensor."""

    def warm_up(self, tables: SteerTables, dtype: torch.dtype) -> None:
        """Compile whatever a batch of rows in ``dtype`` can call, on the tables' device."""
