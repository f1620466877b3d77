"""Seats and blocks for the streams of dynamic requests: who may start, and who gives way.

A group takes its seats all at once and keeps them, for members that wait for each other. Blocks go
as vLLM gives them; where nobody can go for want of them, a group gives its own back.
"""

import time
from collections.abc import Mapping
from typing import Any

from vllm_steer.serving.streams.group import Group


class Room:
    """The seats and blocks of one scheduler, as its groups share them."""

    def __init__(self, scheduler: Any, groups: Mapping[str, Group]) -> None:
        self._scheduler = scheduler
        self._groups = groups
        self._next: Group | None = None

    def new_step(self) -> None:
        """The waiting requests are asked anew, in their order."""
        self._next = None

    def is_open(self, group: Group | None, request: Any) -> bool:
        """Whether a waiting request may be scheduled: none overtakes a group that waits for seats,
        or it would wait as long as others come.
        """
        if group is None or not (group.streams or group.parked):
            return self._next is None
        if group.parked or not group.is_due(request):
            return False
        if not group.started and self._next is None:
            group.started = self._num_free_seats() >= len(group.members)
            self._next = None if group.started else group
        return group.started

    def make(self) -> Group | None:
        """Nobody could go, and no step is being computed: the streams hold all blocks or seats
        while each waits for another.

        The youngest group gives way to the others until one of them has ended. A group that is
        alone and still finds no room never will: it is returned. In a pause that lets running
        requests come to their end, groups with a member that has not got in wait as a whole.
        """
        from vllm.v1.core.sched.interface import PauseState

        scheduler = self._scheduler
        if getattr(scheduler, "deferred_frees", None):  # blocks to come
            return None
        active = [group for group in self._groups.values() if group.streams and not group.parked]
        if scheduler.pause_state == PauseState.PAUSED_NEW:
            for group in active:
                self._take_back(group)
        if scheduler.pause_state or not any(group.wants_room for group in active):
            return None
        if len(active) == 1 and not self._has_others(active[0]):
            return active[0]
        victim = max(active, key=lambda group: (group.num_running > 0, group.main.arrival_time))
        victim.parked = True
        self._take_back(victim)
        return None

    def admit_one(self) -> None:
        """A request or a group has ended: the oldest group that gave way is next."""
        parked = [group for group in self._groups.values() if group.parked]
        if parked:
            min(parked, key=lambda group: group.main.arrival_time).parked = False

    def _num_free_seats(self) -> int:
        """Seats that neither a request nor a group under way will need."""
        scheduler = self._scheduler
        seats = getattr(scheduler, "max_num_active_reqs", scheduler.max_num_running_reqs)
        sessions = getattr(scheduler, "num_waiting_for_streaming_input", 0)
        reserved = sum(group.num_absent for group in self._groups.values() if group.started)
        return int(seats) - len(scheduler.running) - sessions - reserved

    def _take_back(self, group: Group) -> None:
        """All of a group's members wait, and start together."""
        group.started = False
        running = self._scheduler.running
        for member in reversed([m for m in group.members if m in running]):
            running.remove(member)
            self._scheduler._preempt_request(member, time.monotonic())

    def _has_others(self, group: Group) -> bool:
        """Whether there are requests outside of a group that may go before it."""
        parked = {
            member.request_id
            for other in self._groups.values()
            if other.parked or other is group
            for member in other.members
        }
        return any(req_id not in parked for req_id in self._scheduler.requests)
