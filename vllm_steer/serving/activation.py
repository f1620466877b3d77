"""Selects the features that an engine's processes wrap, before the first process starts."""

from vllm_steer.compat.features import unavailable_reason
from vllm_steer.environment import STEERING, STREAM_REQUESTS, STRENGTH_REPORTS, activate


def activate_steering(*, serves_dynamic: bool) -> None:
    """Activate steering in this process and its child processes.

    Dynamic strength is not activated if the installed vLLM lacks a name that it needs; requests for
    it are then rejected. Its streams are not activated if no request may use it.
    """
    activate(STEERING)
    if unavailable_reason("dynamic strength") is None:
        activate(STRENGTH_REPORTS)
        if serves_dynamic:
            activate(STREAM_REQUESTS)
