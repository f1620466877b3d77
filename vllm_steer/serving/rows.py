"""From the requests of a batch to the rows that take a steer, for both model runners."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from vllm_steer.bank import Shelf
from vllm_steer.doses import Dose
from vllm_steer.kernels.lm_steer import SteeredRows

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SteeredRequest:
    """A request in flight that takes steers; ``prompt_len`` says which of its tokens are prompt."""

    doses: tuple[Dose, ...]
    prompt_len: int


@dataclass(frozen=True, eq=False)
class Step:
    """A step's requests in row order: their numbers of logits rows and of tokens on the host, their
    first tokens ``[R + 1]`` and each token's position ``[T]`` on the device.
    """

    req_ids: Sequence[str]
    logits: IntArray
    tokens: IntArray
    query_start_loc: torch.Tensor
    positions: torch.Tensor


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
    requests: Mapping[str, SteeredRequest],
    shelf: Shelf,
) -> SteeredRows | None:
    """The pairs of row and slot of one shelf; None if no row takes one of its steers.

    ``requests`` holds the steered ones only; work on the host grows with their number.
    """
    uses = [
        (index, shelf.slots[dose.steer], dose.strength * shelf.epsilon(dose.steer))
        for index, req_id in enumerate(rows.req_ids)
        if req_id in requests
        for dose in requests[req_id].doses
        if dose.steer in shelf.slots
    ]
    if not uses:
        return None
    users, use_slots, use_scales = (np.array(column) for column in zip(*uses, strict=True))
    repeats = rows.counts[users]
    starts = (np.cumsum(rows.counts) - rows.counts)[users]
    firsts = np.cumsum(repeats) - repeats
    pair_rows = np.arange(repeats.sum()) - np.repeat(firsts - starts, repeats)
    pair_slots = np.repeat(use_slots, repeats)
    order = np.lexsort((pair_rows, pair_slots))
    if order.size == 0:
        return None
    pair_rows, pair_slots = pair_rows[order], pair_slots[order]
    scales = np.repeat(use_scales, repeats)[order].astype(np.float32)
    return SteeredRows(rows=pair_rows, scales=scales, groups=_groups(pair_slots))


def _groups(pair_slots: IntArray) -> tuple[tuple[int, int, int], ...]:
    starts = np.flatnonzero(np.diff(pair_slots, prepend=-1))
    ends = np.append(starts[1:], pair_slots.size)
    return tuple(zip(pair_slots[starts].tolist(), starts.tolist(), ends.tolist(), strict=True))
