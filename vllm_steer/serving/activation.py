"""Decides what an engine's processes wrap, before the first of them starts."""

from vllm_steer.compat.features import unavailable_reason
from vllm_steer.environment import REPORTS, STEERING, STREAMS, activate


def activate_steering(*, may_be_dynamic: bool) -> None:
    """Have this process and those started from it wrap what a steered engine needs.

    What dynamic strength needs is left out where the installed vLLM lacks a part of it: a request
    for it is then refused. Its streams are left out where no request may ask for it.
    """
    activate(STEERING)
    if unavailable_reason("dynamic strength") is None:
        activate(REPORTS)
        if may_be_dynamic:
            activate(STREAMS)
