"""The cache of resolved values; the plan itself is unchanged."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_steer import SteerRequestError
from vllm_steer.plan import SteerPlan
from vllm_steer.request import DoseCache, resolution, resolve
from vllm_steer.request.dose_cache import MAX_ENTRIES, frozen
from vllm_steer.serving.admission import admit
from vllm_steer.serving.plan_transport import plan_of
from vllm_steer.serving.reporting_state import REPORTING
from vllm_steer.serving.request_args import doses_of
from vllm_steer.serving.strength_reports.outputs import sequence_strengths


@pytest.fixture
def plan(make_plan: Any) -> SteerPlan:
    result: SteerPlan = make_plan({"a": 1.0, "b": 2.0})
    return result


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The values that the parser was called with."""
    calls: list[Any] = []
    parse = resolution.parse

    def counting(request_value: Any) -> Any:
        calls.append(request_value)
        return parse(request_value)

    monkeypatch.setattr(resolution, "parse", counting)
    return calls


@pytest.mark.parametrize("request_value", ["a:3", {"a": 3, "b": {"strength": 1.5}}, None], ids=str)
def test_a_repeated_value_is_parsed_once(
    plan: SteerPlan, parsed: list[Any], request_value: Any
) -> None:
    first = plan.doses(copy.deepcopy(request_value))
    for _ in range(5):
        assert plan.doses(copy.deepcopy(request_value)) is first
    assert len(parsed) == 1


def test_a_request_is_parsed_once_from_frontend_to_worker(
    plan: SteerPlan, parsed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from http_tools import load, rewritten

    config = SimpleNamespace(additional_config={"steer": plan.to_json()})
    shared = plan_of(config)
    assert shared is not None
    monkeypatch.setattr(REPORTING, "plan", shared)
    body = rewritten(b'{"steer": {"a": 2}}', shared, route="/v1/completions").body
    params = SimpleNamespace(extra_args=load(body)["vllm_xargs"])
    admit(params, config)
    sequence_strengths(params)
    assert doses_of(params, shared)[0].strength == 2
    assert len(parsed) == 1


def test_errors_are_not_cached(plan: SteerPlan, parsed: list[Any]) -> None:
    for _ in range(3):
        with pytest.raises(SteerRequestError):
            plan.doses("c")
    assert len(parsed) == 3


def test_the_cache_is_bounded_and_drops_the_oldest(plan: SteerPlan, parsed: list[Any]) -> None:
    for n in range(MAX_ENTRIES + 1):
        plan.doses(f"a:{n}.5")
    plan.doses(f"a:{MAX_ENTRIES}.5")
    assert len(parsed) == MAX_ENTRIES + 1
    plan.doses("a:0.5")
    assert len(parsed) == MAX_ENTRIES + 2
    assert len(plan._resolved._doses) == MAX_ENTRIES


def test_equal_values_of_different_types_are_distinguished(plan: SteerPlan) -> None:
    assert len({frozen({"a": value}) for value in (1, 1.0, True, "1")}) == 4
    assert frozen({"a": 1, "b": 2}) != frozen({"b": 2, "a": 1})
    assert frozen([1]) is frozen(5) is frozen(None) is frozen({"a": object()}) is None
    plan.doses({"a": 1})
    for value in (True, [1]):
        with pytest.raises(SteerRequestError):
            plan.doses({"a": value})
    assert plan.doses({"a": 1.0}) == plan.doses({"a": 1})


def test_the_plan_serialises_compares_and_copies_as_before(plan: SteerPlan) -> None:
    other = SteerPlan.from_json(plan.to_json())
    plan.doses("a:3")
    assert "resolved" not in str(plan.to_json())
    assert plan == other == copy.deepcopy(plan) == pickle.loads(pickle.dumps(plan))
    assert len(copy.deepcopy(plan)._resolved._doses) == 0
    with pytest.raises(ValueError, match="frozen"):
        plan.default = "a"  # type: ignore[misc]


def test_a_dict_that_changes_while_it_is_resolved_is_not_cached(make_plan: Any) -> None:
    plan = make_plan({"a": 1.0})
    request_value = {"a": 1}
    memo = DoseCache()

    def resolve_late(value: Any) -> Any:
        request_value["a"] = 7  # as another thread may, after the value was looked up
        return resolve(value, plan)

    assert [dose.strength for dose in memo.get(request_value, resolve_late)] == [1.0]
    assert [dose.strength for dose in memo.get({"a": 1}, resolve_late)] == [1.0]


def test_threads_share_a_cache() -> None:
    memo = DoseCache()
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda n: memo.get(f"a:{n % 300}", lambda _: ()), range(6000)))
    assert set(results) == {()}
    assert len(memo._doses) == MAX_ENTRIES
