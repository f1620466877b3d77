"""What the LM-Steer operation works on: packed tables of steers, and the rows that use them."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LowRank:
    """``epsilon * (a * (x shrink^T)) expand`` with rows ``start:end`` of both tables.

    ``a`` is the row's strength for the first ``free`` inner values and 1 for the others.
    """

    start: int
    end: int
    free: int
    epsilon: float


@dataclass(frozen=True)
class Dense:
    """``epsilon * (v * x M_free^T + x M_fixed^T)`` with two of the dense matrices, or one."""

    free: int
    fixed: int | None
    epsilon: float


@dataclass(frozen=True)
class Constant:
    """``epsilon * (v * free + fixed)`` with two rows of ``vectors``, or one."""

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
    def num_bytes(self) -> int:
        """Device memory of all tables."""
        tables = (self.shrink, self.expand, self.dense, self.vectors)
        return sum(table.numel() * table.element_size() for table in tables)


@dataclass(frozen=True)
class SteeredRows:
    """Which rows take which slot at which strength: P pairs, sorted by slot, then by row.

    rows       ``[P]`` int64, the row of each pair
    strengths  ``[P]`` float32
    groups     ``(slot, start, end)`` on the host: pairs ``start:end`` use ``slot``
    touched    ``[U]`` int64, every row of ``rows`` once, ascending
    places     ``[P]`` int64, where each pair's row stands in ``touched``
    """

    rows: torch.Tensor
    strengths: torch.Tensor
    groups: tuple[tuple[int, int, int], ...]
    touched: torch.Tensor
    places: torch.Tensor
