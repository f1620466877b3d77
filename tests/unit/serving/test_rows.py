"""Which rows take which steer: every array against a loop over the rows."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_steer.bank import HeadTable
from vllm_steer.doses import Dose
from vllm_steer.kernels.lm_steer import Constant, SteeredRows, SteerWeights, torch_grouped
from vllm_steer.serving.row_slots import RequestSlots, steered_rows
from vllm_steer.serving.step import BatchRows, SteeredRequest

CPU = torch.device("cpu")
SLOTS = {"a": 0, "b": 1, "c": 2}
EPSILON = 1.0
EMPTY = torch.empty(0, 0)
TABLE = HeadTable(
    SLOTS, SteerWeights((Constant(0, None, EPSILON),) * 3, EMPTY, EMPTY, EMPTY, EMPTY)
)

batches = st.lists(
    st.tuples(
        st.integers(0, 4),
        st.dictionaries(st.sampled_from(["a", "b", "c", "elsewhere"]), st.floats(-9, 9, width=32)),
    ),
    max_size=7,
)


def batch_rows(counts: list[int]) -> BatchRows:
    return BatchRows([f"request-{i}" for i in range(len(counts))], np.array(counts, dtype=np.int64))


def requests_of(doses: dict[str, dict[str, float]]) -> dict[str, SteeredRequest]:
    """Steered requests by id, from their strengths by steer."""
    return {
        req_id: SteeredRequest(tuple(Dose(name, v) for name, v in strengths.items()), prompt_len=1)
        for req_id, strengths in doses.items()
    }


def owners(counts: list[int]) -> list[str]:
    """The request of each row."""
    return [f"request-{i}" for i, count in enumerate(counts) for _ in range(count)]


def pairs_of(result: SteeredRows | None) -> list[tuple[int, int, float]]:
    """``(slot, row, strength)`` in the order of the arrays."""
    if result is None:
        return []
    slots = {p: slot for slot, start, end in result.groups for p in range(start, end)}
    rows, strengths = result.rows.tolist(), (result.scales / EPSILON).tolist()
    return [(slots[p], row, strengths[p]) for p, row in enumerate(rows)]


@given(batch=batches)
def test_pairs_equal_a_loop_sorted_by_slot_and_row(
    batch: list[tuple[int, dict[str, float]]],
) -> None:
    counts = [count for count, _ in batch]
    doses = {f"request-{i}": d for i, (_, d) in enumerate(batch) if d}
    rows = steered_rows(batch_rows(counts), RequestSlots(TABLE, requests_of(doses)))
    expected = sorted(
        (SLOTS[name], row, strength)
        for row, owner in enumerate(owners(counts))
        for name, strength in doses.get(owner, {}).items()
        if name in SLOTS
    )
    assert pairs_of(rows) == expected
    assert (rows is None) == (not expected)


@given(batch=batches)
def test_each_steered_row_is_listed_once(
    batch: list[tuple[int, dict[str, float]]],
) -> None:
    doses = {f"request-{i}": d for i, (_, d) in enumerate(batch) if d}
    rows = steered_rows(
        batch_rows([count for count, _ in batch]), RequestSlots(TABLE, requests_of(doses))
    )
    if rows is None:
        return
    metadata = torch_grouped.prepare(rows, TABLE.weights, CPU)
    assert metadata.touched.tolist() == sorted(set(rows.rows.tolist()))
    assert (
        metadata.touched[metadata.touched_index].tolist()
        == metadata.rows.tolist()
        == rows.rows.tolist()
    )
    indices = (metadata.rows, metadata.touched, metadata.touched_index)
    assert {tensor.dtype for tensor in indices} == {torch.int64}
    assert metadata.scales.dtype == torch.float32
    assert metadata.scales.tolist() == rows.scales.tolist()
    slots = [slot for slot, _, _ in rows.groups]
    bounds = [bound for _, *bound in rows.groups]
    assert slots == sorted(set(slots))
    assert [b for pair in bounds for b in pair[:1]] == [0, *[end for _, end in bounds[:-1]]]
    assert bounds[-1][1] == len(rows.rows)


@given(
    counts=st.lists(st.integers(0, 5), max_size=6),
    start=st.integers(0, 20),
    length=st.integers(0, 20),
)
def test_a_window_keeps_the_owner_of_every_row(counts: list[int], start: int, length: int) -> None:
    window = batch_rows(counts).window(start, length)
    rows = [
        r for r, n in zip(window.req_ids, window.counts.tolist(), strict=True) for _ in range(n)
    ]
    assert rows == owners(counts)[start : start + length]


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ((["a", "b"], [1, 2]), True),
        ((["b", "a"], [1, 2]), False),
        ((["a", "b"], [2, 1]), False),
        ((["a"], [1]), False),
        ((["a", "b", "c"], [1, 2, 0]), False),
        (None, False),
    ],
    ids=["same", "reordered", "other-counts", "shorter", "longer", "none"],
)
def test_batches_are_the_same_only_if_requests_counts_and_order_are(other: Any, same: bool) -> None:
    rows = BatchRows(["a", "b"], np.array([1, 2]))
    second = None if other is None else BatchRows(other[0], np.array(other[1]))
    assert rows.same_as(second) is same


def test_a_batch_without_rows_has_no_pairs() -> None:
    uses = RequestSlots(TABLE, requests_of({"request-0": {"a": 1.0}}))
    assert steered_rows(batch_rows([]), uses) is None
    assert steered_rows(batch_rows([0]), uses) is None


changes = st.lists(
    st.tuples(
        st.sampled_from(["r0", "r1", "r2", "r3"]),
        st.one_of(
            st.none(), st.dictionaries(st.sampled_from(["a", "b", "c", "elsewhere"]), st.just(2.0))
        ),
    ),
    max_size=12,
)


@given(changes=changes)
def test_finished_requests_do_not_change_the_slots_of_others(
    changes: list[tuple[str, dict[str, float] | None]],
) -> None:
    alive: dict[str, dict[str, float]] = {}
    uses = RequestSlots(TABLE, {})
    for req_id, doses in changes:
        alive.pop(req_id, None)
        if doses is not None:
            alive[req_id] = doses
        uses.set(req_id, None if doses is None else requests_of({req_id: doses})[req_id])
    order = ["r3", "r1", "stranger", "r0", "r2"]
    rows = BatchRows(order, np.array([1, 2, 1, 0, 3]))
    expected = steered_rows(rows, RequestSlots(TABLE, requests_of(alive)))
    assert pairs_of(steered_rows(rows, uses)) == pairs_of(expected)
    assert {row for _, row, _ in pairs_of(expected)} <= {0, 1, 2, 4, 5, 6}
