"""Keeping a waiting request from being scheduled, in every vLLM.

From 0.31 on vLLM's scheduler asks one method about each waiting request. Before, it asked
``_is_blocked_waiting_status`` and only if so ``_try_promote_blocked_waiting_request``; there every
status is taken for blocked while a step is scheduled, so that the second is asked about each.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vllm_steer.compat.patching import wrap

_ASKED = "_handle_blocked_waiting_request"
_ASKED_BEFORE_0_31 = ("_is_blocked_waiting_status", "_try_promote_blocked_waiting_request")


def missing_gate(scheduler: Any) -> list[str]:
    """What a gate needs of a scheduler and this one has not."""
    if hasattr(scheduler, _ASKED) or all(hasattr(scheduler, n) for n in _ASKED_BEFORE_0_31):
        return []
    return [_ASKED]


class Gate:
    """Has ``may_go(is_ready, request)`` decide on each waiting request of a scheduler, where
    ``is_ready(request)`` is the scheduler's own answer.
    """

    def __init__(self, scheduler: Any, may_go: Callable[..., bool]) -> None:
        self._scheduler = scheduler
        self._scheduling = False
        if hasattr(scheduler, _ASKED):
            wrap(scheduler, _ASKED, may_go)
            return
        is_asked, promote = _ASKED_BEFORE_0_31
        self._is_blocked = getattr(scheduler, is_asked)
        self._may_go = may_go
        wrap(scheduler, is_asked, self._is_asked)
        wrap(scheduler, promote, self._promoted)

    @contextmanager
    def scheduling(self) -> Iterator[None]:
        """While a step is scheduled: statuses are not told apart."""
        self._scheduling = True
        try:
            yield
        finally:
            self._scheduling = False

    def forget(self, request: Any) -> None:
        """Let go of a request that has ended. Before 0.27 vLLM does not look among those that were
        skipped, where one is that lost its blocks while its last step was being computed.
        """
        skipped = getattr(self._scheduler, "skipped_waiting", None)
        if skipped:
            skipped.remove_requests([request])

    def _is_asked(self, is_blocked: Callable[[Any], Any], status: Any) -> bool:
        return self._scheduling or bool(is_blocked(status))

    def _promoted(self, promote: Callable[[Any], Any], request: Any) -> bool:
        def is_ready(request: Any) -> bool:
            return not self._is_blocked(request.status) or bool(promote(request))

        return self._may_go(is_ready, request)
