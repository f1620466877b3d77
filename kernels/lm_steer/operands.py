"""What the LM-Steer operation works on: packed tables of steers, and the rows that use them.

``scale`` is ``epsilon * strength`` of a row under a steer; what is fixed enters with ``epsilon``
alone (the paper's dummy steer at value 1).
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LowRank:
    """``(scale * x shrink_free^T) expand_free + epsilon * (x shrink_fixed^T) expand_fixed``.

    In both tables the rows ``start:fixed`` are free and ``fixed:end`` are fixed.
    """

    start: int
    fixed: int
    end: int
    epsilon: float


@dataclass(frozen=True)
class Dense:
    """``scale * x free^T + epsilon * x fixed^T`` with two of the dense matrices, or one."""

    free: int
    fixed: int | None
    epsilon: float


@dataclass(frozen=True)
class Constant:
    """``scale * free + epsilon * fixed`` with two of the vectors, or one."""

    free: int
    fixed: int | None
    epsilon: float


Slot = LowRank | Dense | Constant


@dataclass(frozen=True)
class SteerTables:
    """All resident steers of one width, packed by form; mixed ranks lie side by side, unpadded.

    slots    what each slot is, and where in the tables it lies
    shrink   ``[total_rank, width]``, the P1^T of the low-rank slots
    expand   ``[total_rank, width]``, their P2^T
    dense    ``[matrices, width, width]``, out by in: (P1 P2^T)^T where that is fewer bytes
    vectors  ``[vectors, width]``
    """

    slots: tuple[Slot, ...]
    shrink: torch.Tensor
    expand: torch.Tensor
    dense: torch.Tensor
    vectors: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all tables: the model's."""
        return self.expand.dtype

    @property
    def num_bytes(self) -> int:
        """Device memory of all tables."""
        tables = (self.shrink, self.expand, self.dense, self.vectors)
        return sum(table.numel() * table.element_size() for table in tables)


@dataclass(frozen=True)
class SteeredRows:
    """Which rows take which slot at which scale: P pairs, sorted by slot, then by row.

    rows     ``[P]`` int64, the row of each pair
    scales   ``[P]`` float32, epsilon times strength
    groups   ``(slot, start, end)`` on the host: pairs ``start:end`` use ``slot``
    touched  ``[U]`` int64, every row of ``rows`` once, ascending
    places   ``[P]`` int64, where each pair's row stands in ``touched``
    """

    rows: torch.Tensor
    scales: torch.Tensor
    groups: tuple[tuple[int, int, int], ...]
    touched: torch.Tensor
    places: torch.Tensor
