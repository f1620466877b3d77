"""The gate before a waiting request is scheduled, in the scheduler of each vLLM version."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_steer.serving.dynamic.group_admission import WaitingGate, missing_gate_names


class Before:
    """The two methods of vLLM before 0.31, and its test for a blocked request."""

    def __init__(self) -> None:
        self.promoted: list[str] = []
        self.skipped_waiting = SimpleNamespace(remove_requests=self.promoted.extend)

    @staticmethod
    def _is_blocked_waiting_status(status: str) -> bool:
        return status == "blocked"

    def _try_promote_blocked_waiting_request(self, request: Any) -> bool:
        assert request.status == "blocked"
        self.promoted.append(request.name)
        return request.name != "never"

    def admits(self, request: Any) -> bool:
        blocked = self._is_blocked_waiting_status(request.status)
        return not blocked or self._try_promote_blocked_waiting_request(request)


class After:
    def _handle_blocked_waiting_request(self, request: Any) -> bool:
        return request.name != "never"

    def admits(self, request: Any) -> bool:
        return self._handle_blocked_waiting_request(request)


def request(name: str, status: str = "waiting") -> Any:
    return SimpleNamespace(name=name, status=status)


@pytest.mark.parametrize("kind", [Before, After])
def test_the_gate_checks_each_request_while_a_step_is_scheduled(kind: Any) -> None:
    scheduler, requests_asked = kind(), []

    def may_be_scheduled(is_ready: Any, request: Any) -> bool:
        requests_asked.append(request.name)
        return request.name != "held" and is_ready(request)

    gate = WaitingGate(scheduler, may_be_scheduled)
    waiting = [request("a"), request("held"), request("b", "blocked"), request("never", "blocked")]
    with gate.scheduling():
        assert [scheduler.admits(waiting_request) for waiting_request in waiting] == [
            True,
            False,
            True,
            False,
        ]
    assert requests_asked == ["a", "held", "b", "never"]


def test_the_gate_changes_no_status_outside_of_scheduling() -> None:
    scheduler = Before()
    gate = WaitingGate(scheduler, lambda is_ready, request: False)
    assert not scheduler._is_blocked_waiting_status("waiting")
    with pytest.raises(ZeroDivisionError), gate.scheduling():
        assert scheduler._is_blocked_waiting_status("waiting")
        raise ZeroDivisionError
    assert not scheduler._is_blocked_waiting_status("waiting")
    assert scheduler._is_blocked_waiting_status("blocked")


def test_a_finished_request_is_removed_from_the_skipped_requests() -> None:
    scheduler: Any = Before()
    WaitingGate(scheduler, lambda is_ready, request: True).forget("a")
    assert scheduler.promoted == ["a"]
    WaitingGate(After(), lambda is_ready, request: True).forget("a")


def test_a_scheduler_without_either_has_no_gate() -> None:
    assert missing_gate_names(Before()) == missing_gate_names(After()) == []
    assert missing_gate_names(object()) == ["_handle_blocked_waiting_request"]
