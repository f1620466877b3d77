"""Which waiting requests vLLM's scheduler may schedule, where some belong to request groups.

A group is one request with dynamic strength and its streams. It is admitted as a whole: once one
member runs, slots of ``max_num_seqs`` are reserved for all of them, for members wait for each
other. KV blocks are allocated by vLLM; if no request can be scheduled for want of them, one group
is preempted as a whole.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from vllm_steer.compat.patching import wrap
from vllm_steer.serving.dynamic.request_group import RequestGroup

_GATE_METHOD = "_handle_blocked_waiting_request"
_GATE_METHODS_BEFORE_0_31 = ("_is_blocked_waiting_status", "_try_promote_blocked_waiting_request")


class GroupAdmission:
    """Admission of request groups to the slots and blocks of one scheduler."""

    def __init__(self, scheduler: Any, groups: Mapping[str, RequestGroup]) -> None:
        self._scheduler = scheduler
        self._groups = groups
        self._next: RequestGroup | None = None

    def begin_step(self) -> None:
        """Start a step: the scheduler visits its waiting requests from the first one."""
        self._next = None

    def may_schedule(self, group: RequestGroup | None, request: Any) -> bool:
        """Whether a waiting request may be scheduled.

        No request overtakes a group that waits for slots: the group would wait as long as other
        requests arrive.
        """
        if group is None or not (group.streams or group.suspended):
            return self._next is None
        if group.suspended or not group.is_pending(request):
            return False
        if not group.started and self._next is None:
            group.started = self._num_free_slots() >= len(group.members)
            self._next = None if group.started else group
        return group.started

    def resolve_deadlock(self) -> RequestGroup | None:
        """No request could be scheduled and no step is in flight: groups wait for each other's
        blocks or slots.

        The youngest group is preempted until another request has ended. Returned is a group that
        can never be scheduled: it is alone and does not fit. While the engine is paused for new
        requests and finishes the running ones, groups with a waiting member wait as a whole.
        """
        from vllm.v1.core.sched.interface import PauseState

        scheduler = self._scheduler
        if getattr(scheduler, "deferred_frees", None):  # blocks that are about to be freed
            return None
        active = [g for g in self._groups.values() if g.streams and not g.suspended]
        if scheduler.pause_state == PauseState.PAUSED_NEW:
            for group in active:
                self._preempt(group)
        if scheduler.pause_state or not any(group.needs_blocks for group in active):
            return None
        if len(active) == 1 and not self._has_others(active[0]):
            return active[0]
        victim = max(active, key=lambda group: (group.num_running > 0, group.main.arrival_time))
        victim.suspended = True
        self._preempt(victim)
        return None

    def resume_next(self) -> None:
        """Let the oldest suspended group be scheduled, after a request or a group has ended."""
        suspended = [group for group in self._groups.values() if group.suspended]
        if suspended:
            min(suspended, key=lambda group: group.main.arrival_time).suspended = False

    def _num_free_slots(self) -> int:
        """Slots that neither a running request nor a started group needs."""
        scheduler = self._scheduler
        slots = getattr(scheduler, "max_num_active_reqs", scheduler.max_num_running_reqs)
        sessions = getattr(scheduler, "num_waiting_for_streaming_input", 0)
        reserved = sum(group.num_not_running for group in self._groups.values() if group.started)
        return int(slots) - len(scheduler.running) - sessions - reserved

    def _preempt(self, group: RequestGroup) -> None:
        """Preempt all members, which are then started together."""
        group.started = False
        running = self._scheduler.running
        for member in reversed([m for m in group.members if m in running]):
            running.remove(member)
            self._scheduler._preempt_request(member, time.monotonic())

    def _has_others(self, group: RequestGroup) -> bool:
        """Whether a request outside of a group may still be scheduled before it."""
        excluded = {
            member.request_id
            for other_group in self._groups.values()
            if other_group.suspended or other_group is group
            for member in other_group.members
        }
        return any(req_id not in excluded for req_id in self._scheduler.requests)


class WaitingGate:
    """Has ``may_schedule(is_ready, request)`` decide on each waiting request of a scheduler, where
    ``is_ready(request)`` is the scheduler's own decision.

    From 0.31 on vLLM's scheduler calls one method for each waiting request. Before, it called
    ``_is_blocked_waiting_status`` and only if that was true
    ``_try_promote_blocked_waiting_request``; the first is therefore made true for every status
    while a step is scheduled.
    """

    def __init__(self, scheduler: Any, may_schedule: Callable[..., bool]) -> None:
        self._scheduler = scheduler
        self._scheduling = False
        if hasattr(scheduler, _GATE_METHOD):
            wrap(scheduler, _GATE_METHOD, may_schedule)
            return
        is_blocked, promote = _GATE_METHODS_BEFORE_0_31
        self._is_blocked = getattr(scheduler, is_blocked)
        self._may_schedule = may_schedule
        wrap(scheduler, is_blocked, self._with_every_status)
        wrap(scheduler, promote, self._promoted)

    @contextmanager
    def scheduling(self) -> Iterator[None]:
        """While a step is scheduled, the gate is asked about every status."""
        self._scheduling = True
        try:
            yield
        finally:
            self._scheduling = False

    def forget(self, request: Any) -> None:
        """Drop a request that has ended. Before 0.27 vLLM leaves it among the skipped requests if
        it was preempted while its last step was in flight.
        """
        skipped = getattr(self._scheduler, "skipped_waiting", None)
        if skipped:
            skipped.remove_requests([request])

    def _with_every_status(self, is_blocked: Callable[[Any], Any], status: Any) -> bool:
        return self._scheduling or bool(is_blocked(status))

    def _promoted(self, promote: Callable[[Any], Any], request: Any) -> bool:
        def is_ready(request: Any) -> bool:
            return not self._is_blocked(request.status) or bool(promote(request))

        return self._may_schedule(is_ready, request)


def missing_gate_names(scheduler: Any) -> list[str]:
    """The names that ``WaitingGate`` needs and this scheduler lacks."""
    if hasattr(scheduler, _GATE_METHOD) or all(
        hasattr(scheduler, n) for n in _GATE_METHODS_BEFORE_0_31
    ):
        return []
    return [_GATE_METHOD]
