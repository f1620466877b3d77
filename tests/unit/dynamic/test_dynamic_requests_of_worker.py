"""Dynamic requests of a worker: the role of each request, and their strengths in the pool."""

from itertools import permutations
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from guidance import delta, head, plan_for, vector

from vllm_steer.kernels.lm_steer import reference
from vllm_steer.serving.batch import SteeredBatch, steered_request
from vllm_steer.serving.dynamic.worker_state import DynamicState
from vllm_steer.serving.request_args import STREAM, StreamRequest

STEERS: dict[str, Any] = {
    "walk": delta(3, (0,)),
    "push": vector((0,)),
    "word": head(),
}
PLAN = plan_for(STEERS)
INSIDE = "push:dynamic:2,walk:dynamic:1.5"


def params(steer: Any, max_tokens: int = 6, stream: StreamRequest | None = None) -> Any:
    extra = {"steer": steer} if stream is None else {STREAM: stream.to_args()}
    return SimpleNamespace(extra_args=extra, max_tokens=max_tokens)


def add_request(part: DynamicState, req_id: str, steer: Any = INSIDE, max_tokens: int = 6) -> Any:
    """Add a request, or a stream if its id ends like one."""
    main, _, role = req_id.partition("-")
    stream = None
    if role:
        stream = StreamRequest(main, steer, None if role == "base" else int(role))
    return steered_request(req_id, params(steer, max_tokens, stream), 4, PLAN, part)


@pytest.fixture
def part() -> DynamicState:
    return DynamicState(PLAN, torch.device("cpu"))


@pytest.mark.parametrize("order", [*permutations(["a", "a-base", "a-0", "a-1"])], ids="+".join)
def test_main_request_and_streams_arrive_and_end_in_any_order(
    part: DynamicState, order: tuple[str, ...]
) -> None:
    states = {req_id: add_request(part, req_id) for req_id in order}
    assert states["a-base"] is None
    assert [d.dynamic for d in states["a-0"].doses + states["a-1"].doses] == [None, None]
    assert [d.strength for d in states["a-0"].doses + states["a-1"].doses] == [2.0, 1.5]
    assert set(states["a"].pool_offsets) == {0, 1}
    assert states["a-0"].pool_offsets == states["a-1"].pool_offsets == {}
    assert part.pool.num_taken == 6 + 3
    roles = {req_id: part.requests.role(req_id) for req_id in order}
    assert roles["a"] is None
    assert {r: role[2] for r, role in roles.items() if role} == {"a-base": None, "a-0": 0, "a-1": 1}
    for req_id in reversed(order):
        part.requests.remove(req_id)
    assert part.pool.num_taken == 0
    assert len(part.requests) == 0
    assert all(part.requests.role(req_id) is None for req_id in order)


@pytest.mark.parametrize(
    ("steer", "max_tokens", "num_strengths"),
    [("push:dynamic", 5, 5), ("walk:dynamic", 9, 3), ("walk:dynamic", 2, 2),
     ("word:dynamic", 7, 7), ("push:3", 7, 0), ("walk:dynamic,push:3", 1, 1)],
    ids=str,
)  # fmt: skip
def test_a_dose_takes_one_strength_per_step_that_it_can_act_in(
    part: DynamicState, steer: str, max_tokens: int, num_strengths: int
) -> None:
    add_request(part, "a", steer, max_tokens)
    assert part.pool.num_taken == num_strengths


def test_a_delta_is_active_up_to_its_last_step(part: DynamicState) -> None:
    add_request(part, "a")
    request = part.requests.get("a")
    assert request is not None
    assert [request.active(step) for step in range(6)] == [[0, 1]] * 3 + [[0]] * 3


def test_a_request_that_is_sent_again_keeps_its_numbers(part: DynamicState) -> None:
    """As after a preemption in vLLM's second runner."""
    tables = add_request(part, "a").pool_offsets
    first = part.requests.get("a")
    part.pool.values[tables[0]] = 1.25
    assert add_request(part, "a").pool_offsets == tables
    assert part.requests.get("a") is first
    assert part.pool.values[tables[0]] == 1.25
    assert part.pool.num_taken == 9


def test_a_reused_id_starts_with_new_state(part: DynamicState) -> None:
    for req_id in ("a-base", "a-0", "a-1", "a"):
        add_request(part, req_id)
    old = part.requests.get("a")
    assert old is not None
    old.last_step = 5
    part.pool.values.fill_(9.0)
    for req_id in ("a", "a-base", "a-0", "a-1"):
        part.requests.remove(req_id)
    add_request(part, "a-base", "walk:dynamic")
    new = part.requests.get("a")
    assert new is not None
    assert (new.last_step, new.stored_rows, list(new.starts)) == (-1, {}, [0])
    assert part.pool.values[new.starts[0] : new.starts[0] + 3].tolist() == [0.0] * 3
    assert part.requests.role("a-0") is None
    assert part.pool.num_taken == 3


def test_a_request_at_the_head_is_its_own_base(part: DynamicState) -> None:
    add_request(part, "a", "word:dynamic")
    role = part.requests.role("a")
    assert role is not None
    assert (role[0], role[2]) == ("a", None)
    part.requests.remove("a")
    assert part.requests.role("a") is None


def test_an_unknown_finished_request_is_ignored(part: DynamicState) -> None:
    part.requests.remove("never seen")
    assert part.pool.num_taken == 0


@pytest.mark.parametrize("order", [*permutations(["a", "a-base", "a-0", "a-1"])], ids="+".join)
def test_a_batch_drops_requests_and_streams_in_any_order(order: tuple[str, ...]) -> None:
    """One step after the other: a stream may end when no request is left."""
    batch = SteeredBatch(PLAN, torch.device("cpu"), reference)
    arrivals = []
    for req_id in order:
        main, _, role = req_id.partition("-")
        stream = (
            StreamRequest(main, INSIDE, None if role == "base" else int(role)) if role else None
        )
        arrivals.append((req_id, params(INSIDE, 6, stream), 4))
    batch.begin_step(arrivals, ())
    assert batch.dynamic.requests.num_known == 4
    for req_id in order:
        batch.begin_step((), (req_id,))
    assert batch.dynamic.requests.num_known == 0
    assert batch.dynamic.pool.num_taken == 0
    assert not batch.has_steered_requests
