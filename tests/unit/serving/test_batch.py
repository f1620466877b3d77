"""The batch in flight: over steps, each row carries its own request's steers and no others."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_steer.bank import HeadBank, HeadTable, fill_head_bank
from vllm_steer.kernels.lm_steer import reference
from vllm_steer.serving.batch import SteeredBatch
from vllm_steer.serving.step import Step

CPU = torch.device("cpu")


@pytest.fixture
def bank(make_steer: Any) -> HeadBank:
    steers = {"a": make_steer(), "b": make_steer("add"), "c": make_steer("offset")}
    return fill_head_bank(steers, dtype=torch.float32, device=CPU)


@pytest.fixture
def table(bank: HeadBank) -> HeadTable:
    assert bank.hidden is not None
    return bank.hidden


@pytest.fixture
def batch(make_plan: Any) -> SteeredBatch:
    return SteeredBatch(make_plan({"a": 1.0, "b": 1.0, "c": 1.0}), CPU, reference)


def params(steer: Any = None) -> Any:
    return SimpleNamespace(extra_args=None if steer is None else {"steer": steer})


def step(
    batch: SteeredBatch,
    rows: dict[str, int],
    *,
    new: dict[str, Any] | None = None,
    finished: tuple[str, ...] = (),
    tokens: dict[str, int] | None = None,
) -> None:
    """One step of real requests: ``rows`` are its logits rows by request, in order."""
    batch.begin_step(
        [(req_id, params(steer), 1) for req_id, steer in (new or {}).items()], finished
    )
    logits, counts = (np.array(list(r.values()), dtype=np.int64) for r in (rows, tokens or rows))
    starts = torch.from_numpy(np.cumsum([0, *counts]))
    positions = torch.zeros(int(counts.sum()), dtype=torch.int64)
    batch.announce(Step(list(rows), logits, counts, starts, positions))


def strengths(batch: SteeredBatch, table: HeadTable, num_rows: int) -> dict[int, dict[str, float]]:
    """Row to steers and strengths, as the head would apply them."""
    rows = batch.head_rows.metadata_for(torch.zeros(num_rows, 6), table)
    if rows is None:
        return {}
    names = {slot: name for name, slot in table.slots.items()}
    result: dict[int, dict[str, float]] = {}
    for slot, start, end in rows.groups:
        for pair in range(start, end):
            row = result.setdefault(int(rows.rows[pair]), {})
            row[names[slot]] = float(rows.scales[pair]) / table.epsilon(names[slot])
    return result


def test_each_row_carries_its_own_requests_steers(batch: SteeredBatch, table: HeadTable) -> None:
    step(
        batch,
        {"r1": 1, "r2": 1, "r3": 2, "r4": 1},
        new={"r1": "a:2", "r2": None, "r3": {"a": -1, "b": 4}, "r4": "none"},
    )
    assert strengths(batch, table, 5) == {
        0: {"a": 2},
        2: {"a": -1, "b": 4},
        3: {"a": -1, "b": 4},
    }


def test_requests_keep_their_steers_over_steps_and_batch_positions(
    batch: SteeredBatch, table: HeadTable
) -> None:
    step(batch, {"r1": 1, "r2": 1}, new={"r1": "a:2", "r2": "b:3"})
    step(batch, {"r1": 1, "r2": 1})
    assert strengths(batch, table, 2) == {0: {"a": 2}, 1: {"b": 3}}
    step(batch, {"r2": 1, "r1": 1})
    assert strengths(batch, table, 2) == {0: {"b": 3}, 1: {"a": 2}}
    step(batch, {"r1": 1}, finished=("r2",))
    assert strengths(batch, table, 1) == {0: {"a": 2}}


def test_a_request_that_waits_a_step_keeps_its_steer(batch: SteeredBatch, table: HeadTable) -> None:
    step(batch, {"r1": 1, "r2": 1}, new={"r1": "a:2", "r2": "b:3"})
    step(batch, {"r1": 1})
    step(batch, {"r1": 1, "r2": 1})
    assert strengths(batch, table, 2) == {0: {"a": 2}, 1: {"b": 3}}


def test_a_joining_request_is_noticed(batch: SteeredBatch, table: HeadTable) -> None:
    step(batch, {"r1": 1}, new={"r1": "a:2"})
    assert strengths(batch, table, 1) == {0: {"a": 2}}
    step(batch, {"r1": 1, "r2": 1}, new={"r2": "a:5"})
    assert strengths(batch, table, 2) == {0: {"a": 2}, 1: {"a": 5}}


@pytest.mark.parametrize("again", [None, "none", "a:0", ""], ids=repr)
def test_a_reused_id_without_a_steer_is_unsteered(
    batch: SteeredBatch, table: HeadTable, again: Any
) -> None:
    step(batch, {"r1": 1, "r2": 1}, new={"r1": "a:2", "r2": "a:5"})
    assert strengths(batch, table, 2) == {0: {"a": 2}, 1: {"a": 5}}
    step(batch, {"r1": 1, "r2": 1}, new={"r1": again}, finished=("r1",))
    assert strengths(batch, table, 2) == {1: {"a": 5}}


def test_a_reused_id_takes_its_new_steer(batch: SteeredBatch, table: HeadTable) -> None:
    step(batch, {"r1": 1}, new={"r1": "a:2"})
    assert strengths(batch, table, 1) == {0: {"a": 2}}
    step(batch, {"r1": 1}, new={"r1": "b:7"}, finished=("r1",))
    assert strengths(batch, table, 1) == {0: {"b": 7}}


def test_the_default_of_the_config_steers_requests_without_a_steer(
    make_plan: Any, table: HeadTable
) -> None:
    batch = SteeredBatch(make_plan({"a": 1.0, "b": 1.0}, default="a:4"), CPU, reference)
    step(batch, {"r1": 1, "r2": 1, "r3": 1}, new={"r1": None, "r2": "none", "r3": "b:1"})
    assert strengths(batch, table, 3) == {0: {"a": 4}, 2: {"b": 1}}


def test_each_table_takes_its_own_steers(
    batch: SteeredBatch, bank: HeadBank, table: HeadTable
) -> None:
    assert bank.logits is not None
    step(batch, {"r1": 1, "r2": 1}, new={"r1": "a:2,c:3", "r2": "c:-1"})
    assert strengths(batch, table, 2) == {0: {"a": 2}}
    assert strengths(batch, bank.logits, 2) == {0: {"c": 3}, 1: {"c": -1}}


def test_no_row_is_steered_without_a_steered_request(batch: SteeredBatch, table: HeadTable) -> None:
    batch.begin_step([("r1", params(), 1)], ())
    assert not batch.has_steered_requests
    assert batch.head_rows.metadata_for(torch.zeros(1, 6), table) is None


def test_a_pooling_request_has_no_steers(make_plan: Any) -> None:
    batch = SteeredBatch(make_plan({"a": 1.0}, default="a"), CPU, reference)
    batch.begin_step([("r1", None, 1)], ())
    assert not batch.has_steered_requests


def test_a_step_without_announced_rows_is_an_error(batch: SteeredBatch, table: HeadTable) -> None:
    step(batch, {"r1": 1}, new={"r1": "a:2"})
    batch.begin_step([], ())
    with pytest.raises(RuntimeError, match="reached the LM head without its rows"):
        batch.head_rows.metadata_for(torch.zeros(1, 6), table)


def test_rows_other_than_the_announced_ones_are_an_error(
    batch: SteeredBatch, table: HeadTable
) -> None:
    step(batch, {"r1": 1}, new={"r1": "a:2"})
    with pytest.raises(AssertionError, match="2 logits rows, 1 announced"):
        batch.head_rows.metadata_for(torch.zeros(2, 6), table)


@pytest.mark.parametrize("num_rows", [0, 1, 2, 63])
def test_a_dummy_run_exercises_as_many_steers_on_every_row_as_a_request_may_take(
    batch: SteeredBatch, table: HeadTable, num_rows: int
) -> None:
    expected = {row: {"a": 1.0, "b": 1.0} for row in range(num_rows)}
    assert strengths(batch, table, num_rows) == expected
    step(batch, {"r1": 1}, new={"r1": "a:2"})
    batch.begin_dummy_run()
    assert strengths(batch, table, num_rows) == expected


def test_prompt_tokens_are_steered_with_the_window_of_their_rows(
    batch: SteeredBatch, table: HeadTable
) -> None:
    step(
        batch,
        {"r1": 1, "r2": 1, "r3": 1},
        new={"r1": "a:2", "r2": None, "r3": "b:3"},
        tokens={"r1": 3, "r2": 2, "r3": 4},
    )
    hidden_states = torch.zeros(9, 6)
    with batch.head_rows.over_tokens(hidden_states):
        for start, end, expected in [
            (0, 3, {0: {"a": 2}, 1: {"a": 2}, 2: {"a": 2}}),
            (3, 5, {}),
            (5, 8, {0: {"b": 3}, 1: {"b": 3}, 2: {"b": 3}}),
            (2, 6, {0: {"a": 2}, 3: {"b": 3}}),
        ]:
            result = batch.head_rows.metadata_for(hidden_states[start:end], table)
            rows = {} if result is None else sorted(result.rows.tolist())
            assert sorted(rows) == sorted(expected)
        with pytest.raises(RuntimeError, match="no slice of the model's output"):
            batch.head_rows.metadata_for(hidden_states[:2].clone(), table)
    assert strengths(batch, table, 3) == {0: {"a": 2}, 2: {"b": 3}}


def test_prompt_tokens_in_a_view_that_starts_late_are_found(
    batch: SteeredBatch, table: HeadTable
) -> None:
    step(batch, {"r1": 1, "r2": 1}, new={"r1": None, "r2": "a:2"}, tokens={"r1": 2, "r2": 3})
    hidden_states = torch.zeros(8, 6)[3:]
    with batch.head_rows.over_tokens(hidden_states):
        rows = batch.head_rows.metadata_for(hidden_states[1:4], table)
    assert rows is not None
    assert rows.rows.tolist() == [1, 2]


def test_an_error_ends_the_context_of_prompt_tokens(batch: SteeredBatch, table: HeadTable) -> None:
    step(batch, {"r1": 1}, new={"r1": "a:2"}, tokens={"r1": 5})
    with pytest.raises(KeyError), batch.head_rows.over_tokens(torch.zeros(5, 6)):
        raise KeyError
    assert strengths(batch, table, 1) == {0: {"a": 2}}


@pytest.mark.parametrize("allowed", [1, 2, 3])
def test_a_dummy_run_takes_no_more_steers_per_row_than_a_request_may(
    make_plan: Any, table: HeadTable, allowed: int
) -> None:
    plan = make_plan({"a": 1.0, "b": 1.0, "c": 1.0}, max_steers_per_request=allowed)
    rows = strengths(SteeredBatch(plan, CPU, reference), table, 5)
    assert {len(steers) for steers in rows.values()} == {min(allowed, len(table.slots))}


def test_a_step_that_ends_unannounced_is_an_error_where_requests_are_steered(
    batch: SteeredBatch,
) -> None:
    batch.begin_step([("r1", params(), 1)], ())
    batch.require_announced()
    step(batch, {"r1": 1, "r2": 1}, new={"r2": "a:2"})
    batch.require_announced()
    batch.begin_step([], ())
    with pytest.raises(RuntimeError, match="a step with steered requests ran without its rows"):
        batch.require_announced()


def test_only_prompt_tokens_are_processed_in_chunks(make_plan: Any) -> None:
    batch = SteeredBatch(make_plan({"a": 1.0}), CPU, reference, max_rows=200)
    step(batch, {"r1": 1}, new={"r1": "a:2"}, tokens={"r1": 450})
    hidden_states = torch.zeros(450, 6)
    assert batch.head_rows.parts_of(hidden_states) == [slice(0, 450)]
    with batch.head_rows.over_tokens(hidden_states):
        assert batch.head_rows.parts_of(hidden_states) == [
            slice(0, 200),
            slice(200, 400),
            slice(400, 600),
        ]
        assert batch.head_rows.parts_of(hidden_states[:200]) == [slice(0, 200)]


@pytest.mark.parametrize("max_rows", [1, 8, 128])
def test_the_chunks_of_a_small_engine_are_not_small(make_plan: Any, max_rows: int) -> None:
    batch = SteeredBatch(make_plan({"a": 1.0}), CPU, reference, max_rows=max_rows)
    assert batch.head_rows.rows_at_once == 128
