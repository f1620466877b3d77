"""The pairs of row and slot of a batch, for the steers of one table of the LM head."""

from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_steer.bank import HeadTable
from vllm_steer.kernels.lm_steer import SteeredRows
from vllm_steer.serving.step import BatchRows, SteeredRequest

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
SlotArray = npt.NDArray[np.int16]

_NONE = -1


class SelectedSlots(NamedTuple):
    """The steers of a batch: indices into its requests, and the slot, scale and gate of each."""

    users: IntArray
    slots: SlotArray
    scales: FloatArray
    gates: IntArray


class RequestSlots:
    """The slots of each steered request, with their scales and gates.

    A scale is epsilon times strength; of a dynamic dose it is epsilon until its strength, which is
    on the device, is known. There is a line per
    steered request, which is written when the request comes or ends, so that a batch takes no loop
    over its requests. The last line is an empty sentinel for all unsteered requests.
    """

    def __init__(self, table: HeadTable, requests: Mapping[str, SteeredRequest]) -> None:
        self._table = table
        self._line_of: dict[str, int] = {}
        self._free: list[int] = []
        self._slots = np.full((1, 1), _NONE, dtype=np.int16)
        self._scales = np.zeros((1, 1), dtype=np.float32)
        self._gates = np.zeros((1, 1), dtype=np.int64)
        for req_id, request in requests.items():
            self.set(req_id, request)

    def __len__(self) -> int:
        return len(self._line_of)

    def set(self, req_id: str, request: SteeredRequest | None) -> None:
        """A request came, came again with other steers, or ended (None)."""
        if req_id in self._line_of:
            line = self._line_of.pop(req_id)
            self._slots[line] = _NONE
            self._free.append(line)
        if request is None:
            return
        doses = [
            (index, dose)
            for index, dose in enumerate(request.doses)
            if dose.entry in self._table.slots
        ]
        if not doses:
            return
        self._grow(len(doses))
        line = self._line_of[req_id] = self._free.pop()
        for column, (index, dose) in enumerate(doses):
            self._gates[line, column] = request.gates.get(index, 0)
            self._slots[line, column] = self._table.slots[dose.entry]
            strength = 1.0 if dose.dynamic else dose.strength
            self._scales[line, column] = strength * self._table.epsilon(dose.entry)

    def select(self, req_ids: Sequence[str]) -> SelectedSlots:
        """The steers of a batch, in its order."""
        lines = np.fromiter(
            map(self._line_of.get, req_ids, repeat(_NONE)), dtype=np.int64, count=len(req_ids)
        )
        slots = self._slots[lines]
        users, columns = np.nonzero(slots != _NONE)
        scales = self._scales[lines[users], columns]
        gates = self._gates[lines[users], columns]
        return SelectedSlots(
            users.astype(np.int64, copy=False), slots[users, columns], scales, gates
        )

    def _grow(self, doses: int) -> None:
        """Provide a free line and ``doses`` columns; both grow by doubling."""
        lines, width = self._slots.shape
        grown_lines = lines if self._free else 2 * lines
        grown_width = width if doses <= width else max(doses, 2 * width)
        if (grown_lines, grown_width) == (lines, width):
            return
        slots = np.full((grown_lines, grown_width), _NONE, dtype=np.int16)
        scales = np.zeros((grown_lines, grown_width), dtype=np.float32)
        gates = np.zeros((grown_lines, grown_width), dtype=np.int64)
        slots[: lines - 1, :width] = self._slots[:-1]
        scales[: lines - 1, :width] = self._scales[:-1]
        gates[: lines - 1, :width] = self._gates[:-1]
        self._slots, self._scales, self._gates = slots, scales, gates
        self._free += range(lines - 1, grown_lines - 1)


def steered_rows(rows: BatchRows, request_slots: RequestSlots) -> SteeredRows | None:
    """The pairs of row and slot of one table; None if no row has one of its steers."""
    users, slots, scales, gates = request_slots.select(rows.req_ids)
    pair_rows = users
    if not rows.one_each:
        pair_rows, copies = _rows_of(rows, users)
        slots, scales = np.repeat(slots, copies), np.repeat(scales, copies)
        gates = np.repeat(gates, copies)
    return sorted_pairs(pair_rows, slots, scales, gates)


def sorted_pairs(
    rows: IntArray, slots: SlotArray, scales: FloatArray, gates: IntArray
) -> SteeredRows | None:
    """Pairs whose rows ascend, by slot and then by row; None if there are none."""
    if rows.size == 0:
        return None
    order = np.argsort(slots, kind="stable")
    return SteeredRows(
        rows=rows[order],
        scales=scales[order],
        groups=_groups(slots),
        gates=gates[order] if gates.any() else None,
    )


def _rows_of(rows: BatchRows, users: IntArray) -> tuple[IntArray, IntArray]:
    """The rows of some requests, one request after the other, and how many each has."""
    copies = rows.counts[users]
    before = (np.cumsum(rows.counts) - rows.counts)[users] - (np.cumsum(copies) - copies)
    return np.arange(copies.sum()) + np.repeat(before, copies), copies


def _groups(slots: SlotArray) -> tuple[tuple[int, int, int], ...]:
    """For each slot its range in the slots sorted ascending."""
    counts = np.bincount(slots)
    used, ends = np.flatnonzero(counts), np.cumsum(counts)
    starts = ends - counts
    return tuple(zip(used.tolist(), starts[used].tolist(), ends[used].tolist(), strict=True))
