"""The pairs of row and slot of a step in which strengths are computed at the LM head.

Pass 1 steers the rows whose strengths are known, leaves requests that are their own base unsteered,
and adds one probe row per dynamic dose at its maximum strength. Pass 2 computes the requests that
are their own base again, under the strengths that pass 1 has led to.
"""

from dataclasses import dataclass

import numpy as np
import torch

from vllm_steer.bank import HeadTable
from vllm_steer.kernels.lm_steer import SteeredRows
from vllm_steer.kernels.upload import upload
from vllm_steer.serving.dynamic.requests import DynamicRequests
from vllm_steer.serving.dynamic.strengths import DynamicStep
from vllm_steer.serving.row_slots import RequestSlots, sorted_pairs
from vllm_steer.serving.step import BatchRows, IntArray


@dataclass(frozen=True, eq=False)
class HeadProduct:
    """Pairs of row and slot; ``dynamic_pairs[i]`` has its strength at ``pool_indices[i]``.

    The scale of a dynamic pair is epsilon until ``scale_by`` multiplies it by the strength.
    """

    steered: SteeredRows
    dynamic_pairs: IntArray
    pool_indices: IntArray

    def part(self, first: int, last: int) -> "HeadProduct | None":
        """The pairs of rows ``first`` to ``last``, renumbered from 0; None if there are none."""
        inside = (self.steered.rows >= first) & (self.steered.rows < last)
        if first == 0 and inside.all():
            return self
        if not inside.any():
            return None
        new_index = np.cumsum(inside) - 1
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
            gates=None if self.steered.gates is None else self.steered.gates[inside],
        )
        in_part = inside[self.dynamic_pairs]
        return HeadProduct(
            steered, new_index[self.dynamic_pairs[in_part]], self.pool_indices[in_part]
        )

    def scale_by(self, values: torch.Tensor, scales: torch.Tensor) -> None:
        """Multiply the scales by the strengths in ``values``, on the device."""
        if self.dynamic_pairs.size:
            pairs, indices = upload([self.dynamic_pairs, self.pool_indices], values.device)
            scales.index_put_((pairs,), scales[pairs] * values[indices])


def first_product(
    step: DynamicStep,
    rows: BatchRows,
    slots_of: RequestSlots,
    table: HeadTable,
    requests: DynamicRequests,
) -> HeadProduct | None:
    """All rows but those of pass 2, and the probes."""
    if not (step.probes or slots_of):
        return None
    users, slots, scales, gates = slots_of.select(rows.req_ids)
    in_second_product = np.zeros(rows.num_rows, dtype=bool)
    in_second_product[step.alone] = True
    in_first_product = ~in_second_product[users]
    probes = [
        (rows.num_rows + k, table.slots[probe.steer], probe.strength * table.epsilon(probe.steer))
        for k, probe in enumerate(step.probes)
        if probe.steer in table.slots
    ]
    if not (probes or users.size):
        return None
    probe_columns = np.array(probes, dtype=np.float64).reshape(-1, 3).T
    steered = sorted_pairs(
        np.concatenate([users[in_first_product], probe_columns[0].astype(np.int64)]),
        np.concatenate([slots[in_first_product], probe_columns[1].astype(slots.dtype)]),
        np.concatenate([scales[in_first_product], probe_columns[2].astype(np.float32)]),
        np.concatenate([gates[in_first_product], np.zeros(len(probes), dtype=np.int64)]),
    )
    return _pass(steered, dict(enumerate(rows.req_ids)), step, table, requests)


def second_product(
    step: DynamicStep,
    rows: BatchRows,
    slots_of: RequestSlots,
    table: HeadTable,
    requests: DynamicRequests,
) -> HeadProduct | None:
    """The rows of ``step.alone``, numbered in that order."""
    req_ids = [rows.req_ids[row] for row in step.alone]
    return _pass(
        sorted_pairs(*slots_of.select(req_ids)), dict(enumerate(req_ids)), step, table, requests
    )


def _pass(
    steered: SteeredRows | None,
    req_id_of: dict[int, str],
    step: DynamicStep,
    table: HeadTable,
    requests: DynamicRequests,
) -> HeadProduct | None:
    """Add where the strengths of dynamic pairs are in the pool."""
    if steered is None:
        return None
    pairs, indices = [], []
    for row, req_id in req_id_of.items():
        request = requests.get(req_id) if req_id in step.steps else None
        if request is None:
            continue
        for index in request.active(step.steps[req_id]):
            slot = table.slots.get(request.doses[index].entry)
            pair = None if slot is None else _find(steered, row, slot)
            if pair is not None:
                pairs.append(pair)
                indices.append(request.starts[index] + step.steps[req_id])
    return HeadProduct(steered, np.array(pairs, dtype=np.int64), np.array(indices, dtype=np.int64))


def _find(steered: SteeredRows, row: int, slot: int) -> int | None:
    """The pair of a row and a slot; rows ascend within a slot."""
    for group, start, end in steered.groups:
        if group == slot:
            pair = start + int(np.searchsorted(steered.rows[start:end], row))
            return pair if pair < end and steered.rows[pair] == row else None
    return None
