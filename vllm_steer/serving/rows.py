"""From the requests of a batch to the rows that take a steer, for both model runners."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from vllm_steer.bank import Shelf
from vllm_steer.kernels.lm_steer import SteeredRows

IntArray = npt.NDArray[np.int64]
Doses = Mapping[str, float]


@dataclass(frozen=True, eq=False)
class BatchRows:
    """Rows of one tensor by request: ``counts[i]`` consecutive rows belong to ``req_ids[i]``."""

    req_ids: Sequence[str]
    counts: IntArray

    @cached_property
    def num_rows(self) -> int:
        """Rows in all."""
        return int(self.counts.sum())

    def same_as(self, other: "BatchRows | None") -> bool:
        """Whether both describe the same requests with the same rows in the same order."""
        return (
            other is not None
            and self.req_ids == other.req_ids
            and np.array_equal(self.counts, other.counts)
        )

    def window(self, start: int, length: int) -> "BatchRows":
        """The rows ``start`` to ``start + length`` only, as rows 0 to ``length``."""
        ends = np.cumsum(self.counts)
        inside = np.minimum(ends, start + length) - np.maximum(ends - self.counts, start)
        return BatchRows(self.req_ids, np.maximum(inside, 0))


def steered_rows(
    rows: BatchRows,
    doses: Mapping[str, Doses],
    shelf: Shelf,
    device: torch.device,
) -> SteeredRows | None:
    """The pairs of row and slot of one shelf; None if no row takes one of its steers.

    ``doses`` holds the steered requests only. Work on the host grows with their number; what goes
    to the device is one copy per tensor, asynchronous from pinned memory on a GPU.
    """
    uses = [
        (index, shelf.slots[name], strength * shelf.epsilon(name))
        for index, req_id in enumerate(rows.req_ids)
        if req_id in doses
        for name, strength in doses[req_id].items()
        if name in shelf.slots
    ]
    if not uses:
        return None
    requests, use_slots, use_scales = (np.array(column) for column in zip(*uses, strict=True))
    repeats = rows.counts[requests]
    starts = (np.cumsum(rows.counts) - rows.counts)[requests]
    firsts = np.cumsum(repeats) - repeats
    pair_rows = np.arange(repeats.sum()) - np.repeat(firsts - starts, repeats)
    pair_slots = np.repeat(use_slots, repeats)
    order = np.lexsort((pair_rows, pair_slots))
    if order.size == 0:
        return None
    pair_rows, pair_slots = pair_rows[order], pair_slots[order]
    scales = np.repeat(use_scales, repeats)[order].astype(np.float32)
    touched, places = np.unique(pair_rows, return_inverse=True)
    return SteeredRows(
        rows=_to_device(pair_rows, device),
        scales=_to_device(scales, device),
        groups=_groups(pair_slots),
        touched=_to_device(touched, device),
        places=_to_device(places, device),
    )


def _groups(pair_slots: IntArray) -> tuple[tuple[int, int, int], ...]:
    starts = np.flatnonzero(np.diff(pair_slots, prepend=-1))
    ends = np.append(starts[1:], pair_slots.size)
    return tuple(zip(pair_slots[starts].tolist(), starts.tolist(), ends.tolist(), strict=True))


def _to_device(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    host = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)
