"""The pairs of row and slot of a step in which strengths are worked out at the LM head.

The first pass gives every row that it needs no new strength for its doses, requests that are their
own base none, and each probe its one dose at the maximum. The second pass computes those requests
again, under the strengths that the first has led to.
"""

from dataclasses import dataclass

import numpy as np
import torch

from vllm_steer.bank import Shelf
from vllm_steer.kernels.lm_steer import SteeredRows
from vllm_steer.kernels.upload import upload
from vllm_steer.serving.pairs import Uses, sorted_pairs
from vllm_steer.serving.rows import BatchRows, IntArray
from vllm_steer.serving.streams.requests import DynamicRequests
from vllm_steer.serving.streams.strengths import StepStrengths


@dataclass(frozen=True, eq=False)
class HeadPass:
    """Pairs, and for those with a dynamic dose their place in the pool: ``pairs`` and ``places``.

    The scale of such a pair is epsilon until ``scale_by`` multiplies it by the strength.
    """

    steered: SteeredRows
    pairs: IntArray
    places: IntArray

    def part(self, first: int, last: int) -> "HeadPass | None":
        """The pairs of the rows from ``first`` to ``last``, as rows 0 and on; None without any."""
        inside = (self.steered.rows >= first) & (self.steered.rows < last)
        if first == 0 and inside.all():
            return self
        if not inside.any():
            return None
        place = np.cumsum(inside) - 1  # of each pair that stays
        groups: list[tuple[int, int, int]] = []
        for slot, start, end in self.steered.groups:
            count = int(inside[start:end].sum())
            if count:
                begin = groups[-1][2] if groups else 0
                groups.append((slot, begin, begin + count))
        steered = SteeredRows(
            rows=self.steered.rows[inside] - first,
            scales=self.steered.scales[inside],
            groups=tuple(groups),
        )
        stays = inside[self.pairs]
        return HeadPass(steered, place[self.pairs[stays]], self.places[stays])

    def scale_by(self, values: torch.Tensor, scales: torch.Tensor) -> None:
        """Multiply the placed scales by the strengths in ``values``, on the device."""
        if self.pairs.size:
            pairs, places = upload([self.pairs, self.places], values.device)
            scales.index_put_((pairs,), scales[pairs] * values[places])


def first_pass(
    step: StepStrengths, rows: BatchRows, uses: Uses, shelf: Shelf, requests: DynamicRequests
) -> HeadPass | None:
    """All rows but those that come again, and the probes."""
    if not (step.probes or uses):
        return None
    users, slots, scales = uses.of(rows.req_ids)
    comes_again = np.zeros(rows.num_rows, dtype=bool)
    comes_again[step.alone] = True
    stays = ~comes_again[users]
    probes = [
        (rows.num_rows + k, shelf.slots[probe.steer], probe.strength * shelf.epsilon(probe.steer))
        for k, probe in enumerate(step.probes)
        if probe.steer in shelf.slots
    ]
    if not (probes or users.size):
        return None
    more = np.array(probes, dtype=np.float64).reshape(-1, 3).T
    steered = sorted_pairs(
        np.concatenate([users[stays], more[0].astype(np.int64)]),
        np.concatenate([slots[stays], more[1].astype(slots.dtype)]),
        np.concatenate([scales[stays], more[2].astype(np.float32)]),
    )
    return _pass(steered, dict(enumerate(rows.req_ids)), step, shelf, requests)


def second_pass(
    step: StepStrengths, rows: BatchRows, uses: Uses, shelf: Shelf, requests: DynamicRequests
) -> HeadPass | None:
    """The rows that come again, numbered as they stand in ``step.alone``."""
    again = [rows.req_ids[row] for row in step.alone]
    return _pass(sorted_pairs(*uses.of(again)), dict(enumerate(again)), step, shelf, requests)


def _pass(
    steered: SteeredRows | None,
    req_id_of: dict[int, str],
    step: StepStrengths,
    shelf: Shelf,
    requests: DynamicRequests,
) -> HeadPass | None:
    """Find the pairs whose strength lies in the pool."""
    if steered is None:
        return None
    pairs, places = [], []
    for row, req_id in req_id_of.items():
        request = requests.get(req_id) if req_id in step.steps else None
        if request is None:
            continue
        for index in request.active(step.steps[req_id]):
            slot = shelf.slots.get(request.doses[index].steer)
            pair = None if slot is None else _find(steered, row, slot)
            if pair is not None:
                pairs.append(pair)
                places.append(request.starts[index] + step.steps[req_id])
    return HeadPass(steered, np.array(pairs, dtype=np.int64), np.array(places, dtype=np.int64))


def _find(steered: SteeredRows, row: int, slot: int) -> int | None:
    """The pair of a row and a slot; rows ascend within a slot."""
    for group, start, end in steered.groups:
        if group == slot:
            pair = start + int(np.searchsorted(steered.rows[start:end], row))
            return pair if pair < end and steered.rows[pair] == row else None
    return None
