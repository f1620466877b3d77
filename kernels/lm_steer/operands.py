"""The operands of LM-Steer: the packed weights of steers, and the rows that use them.

``scale`` is ``epsilon * strength`` of a row and a steer. Fixed columns have the factor ``epsilon``
(the paper's dummy steer at value 1) unless ``scale`` is 0: at strength 0 a steer has no effect.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LowRank:
    """``(scale * x shrink_free^T) expand_free + epsilon * (x shrink_fixed^T) expand_fixed``.

    In both weights the rows ``start:fixed`` are free and ``fixed:end`` are fixed.
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
KINDS = (LowRank, Dense, Constant)


@dataclass(frozen=True, eq=False)
class SlotColumns:
    """The slots as arrays: each one's place in ``KINDS``, its three numbers, its epsilon.

    kinds ``[S]``, bounds ``[S, 3]`` (start, fixed, end; or free, fixed, 0; -1: not there),
    epsilons ``[S]`` float32.
    """

    kinds: IntArray
    bounds: IntArray
    epsilons: FloatArray
    max_rank: int

    @property
    def rank_stride(self) -> int:
        """Length of a pair's row between the two factors: whole blocks of ranks."""
        return -(-self.max_rank // 64) * 64


@dataclass(frozen=True)
class SteerWeights:
    """All resident steers of one width, packed by storage; mixed ranks lie side by side, unpadded.

    slots    what each slot is, and where in the weights it lies
    shrink   ``[total_rank, width]``, the P1^T of the low-rank slots
    expand   ``[total_rank, width]``, their P2^T
    dense    ``[matrices, width, width]``, out by in: (P1 P2^T)^T where that is fewer bytes
    vectors  ``[vectors, width]``
    reserved_ranks  ranks that a slot may come to have: block sizes allow for them
    """

    slots: tuple[Slot, ...]
    shrink: torch.Tensor
    expand: torch.Tensor
    dense: torch.Tensor
    vectors: torch.Tensor
    reserved_ranks: int = 0

    @cached_property
    def columns(self) -> SlotColumns:
        """The slots as arrays, made once."""
        bounds = [_bounds(slot) for slot in self.slots]
        ranks = [s.end - s.start for s in self.slots if isinstance(s, LowRank)]
        return SlotColumns(
            kinds=np.array([KINDS.index(type(slot)) for slot in self.slots], dtype=np.int64),
            bounds=np.array(bounds, dtype=np.int64).reshape(-1, 3),
            epsilons=np.array([slot.epsilon for slot in self.slots], dtype=np.float32),
            max_rank=max([*ranks, self.reserved_ranks], default=0),
        )

    @property
    def width(self) -> int:
        """Width of the rows that the steers act on."""
        return self.expand.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all weights: the model's."""
        return self.expand.dtype

    @property
    def num_bytes(self) -> int:
        """Device memory of all weights."""
        weights = (self.shrink, self.expand, self.dense, self.vectors)
        return sum(table.numel() * table.element_size() for table in weights)


@dataclass(frozen=True, eq=False)
class SteeredRows:
    """P (row, slot, scale) entries on the host, sorted by slot, then by row.

    rows    ``[P]`` int64, the row of each pair
    scales  ``[P]`` float32, epsilon times strength
    groups  ``(slot, start, end)``: pairs ``start:end`` use ``slot``
    gates   ``[P]`` int64, the gate of each pair, 0 for none; None where no pair has one. Whoever
            knows which gates are open multiplies the scales by that on the device
    """

    rows: IntArray
    scales: FloatArray
    groups: tuple[tuple[int, int, int], ...]
    gates: IntArray | None = None


def _bounds(slot: Slot) -> tuple[int, int, int]:
    if isinstance(slot, LowRank):
        return slot.start, slot.fixed, slot.end
    return slot.free, -1 if slot.fixed is None else slot.fixed, 0
