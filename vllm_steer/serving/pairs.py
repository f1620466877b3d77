"""From the requests of a batch to its pairs of row and slot, for the steers of one shelf."""

from collections.abc import Mapping, Sequence
from itertools import repeat

import numpy as np
import numpy.typing as npt

from vllm_steer.bank import Shelf
from vllm_steer.kernels.lm_steer import SteeredRows
from vllm_steer.serving.rows import BatchRows, SteeredRequest

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
SlotArray = npt.NDArray[np.int16]

_NONE = -1


class Uses:
    """A line per steered request: the slots it takes, and each one's scale, epsilon times strength.

    For a dynamic dose the scale is epsilon, its strength lies on the device.

    Filled when a request comes or goes, so that a batch of any size takes no loop over its
    requests. The last line is nobody's and stays empty: it stands for all requests without a steer.
    """

    def __init__(self, shelf: Shelf, requests: Mapping[str, SteeredRequest]) -> None:
        self._shelf = shelf
        self._line_of: dict[str, int] = {}
        self._free: list[int] = []
        self._slots = np.full((1, 1), _NONE, dtype=np.int16)
        self._scales = np.zeros((1, 1), dtype=np.float32)
        for req_id, request in requests.items():
            self.set(req_id, request)

    def __len__(self) -> int:
        return len(self._line_of)

    def set(self, req_id: str, request: SteeredRequest | None) -> None:
        """A request came, came again with other steers, or went (None)."""
        if req_id in self._line_of:
            line = self._line_of.pop(req_id)
            self._slots[line] = _NONE
            self._free.append(line)
        if request is None:
            return
        mine = [dose for dose in request.doses if dose.steer in self._shelf.slots]
        if not mine:
            return
        self._make_room(len(mine))
        line = self._line_of[req_id] = self._free.pop()
        for place, dose in enumerate(mine):
            self._slots[line, place] = self._shelf.slots[dose.steer]
            strength = 1.0 if dose.dynamic else dose.strength
            self._scales[line, place] = strength * self._shelf.epsilon(dose.steer)

    def of(self, req_ids: Sequence[str]) -> tuple[IntArray, SlotArray, FloatArray]:
        """The uses of a batch, in its order: whose they are (an index into ``req_ids``), slots,
        scales.
        """
        lines = np.fromiter(
            map(self._line_of.get, req_ids, repeat(_NONE)), dtype=np.int64, count=len(req_ids)
        )
        slots = self._slots[lines]
        users, places = np.nonzero(slots != _NONE)
        taken = slots[users, places], self._scales[lines[users], places]
        return users.astype(np.int64, copy=False), *taken

    def _make_room(self, doses: int) -> None:
        """A free line, and room for ``doses`` in every line; both grow by doubling."""
        lines, width = self._slots.shape
        grown_lines = lines if self._free else 2 * lines
        grown_width = width if doses <= width else max(doses, 2 * width)
        if (grown_lines, grown_width) == (lines, width):
            return
        slots = np.full((grown_lines, grown_width), _NONE, dtype=np.int16)
        scales = np.zeros((grown_lines, grown_width), dtype=np.float32)
        slots[: lines - 1, :width], scales[: lines - 1, :width] = (
            self._slots[:-1],
            self._scales[:-1],
        )
        self._slots, self._scales = slots, scales
        self._free += range(lines - 1, grown_lines - 1)


def steered_rows(rows: BatchRows, uses: Uses) -> SteeredRows | None:
    """The pairs of row and slot of one shelf; None if no row takes one of its steers."""
    users, slots, scales = uses.of(rows.req_ids)
    pair_rows = users
    if not rows.one_each:
        pair_rows, copies = _rows_of(rows, users)
        slots, scales = np.repeat(slots, copies), np.repeat(scales, copies)
    return sorted_pairs(pair_rows, slots, scales)


def sorted_pairs(rows: IntArray, slots: SlotArray, scales: FloatArray) -> SteeredRows | None:
    """Pairs whose rows ascend, by slot and then by row; None if there are none."""
    if rows.size == 0:
        return None
    order = np.argsort(slots, kind="stable")
    return SteeredRows(rows=rows[order], scales=scales[order], groups=_groups(slots))


def _rows_of(rows: BatchRows, users: IntArray) -> tuple[IntArray, IntArray]:
    """The rows of some requests, one request after the other, and how many each has."""
    copies = rows.counts[users]
    before = (np.cumsum(rows.counts) - rows.counts)[users] - (np.cumsum(copies) - copies)
    return np.arange(copies.sum()) + np.repeat(before, copies), copies


def _groups(slots: SlotArray) -> tuple[tuple[int, int, int], ...]:
    """The stretches of one slot among the slots in ascending order."""
    counts = np.bincount(slots)
    used, ends = np.flatnonzero(counts), np.cumsum(counts)
    starts = ends - counts
    return tuple(zip(used.tolist(), starts[used].tolist(), ends[used].tolist(), strict=True))
