"""Selects the features that an engine's processes wrap, before the first process starts."""

from vllm_steer.compat.features import unavailable_reason
from vllm_steer.environment import REPORTS, STEERING, STREAMS, activate


def activate_steering(*, may_be_dynamic: bool) -> None:
    """Activate steering in this process and its child processes.

    Dynamic strength is not activated if the installed vLLM lacks a name that it needs; requests for
    it are then rejected. Its streams are not activated if no request may use it.
    """
    activate(STEERING)
    if unavailable_reason("dynamic strength") is None:
        activate(REPORTS)
        if may_be_dynamic:
            activate(STREAMS)
