"""Admission: checks a request in the frontend, and again in the engine core."""

from typing import Any

from vllm_steer.doses import Dose, is_dynamic
from vllm_steer.plan import SteerPlan
from vllm_steer.serving.cache_key import SteeredSalt, steered_salt
from vllm_steer.serving.plan_transport import plan_of
from vllm_steer.serving.reporting_state import enable_reporting
from vllm_steer.serving.request_args import (
    STREAM,
    STRENGTHS,
    RejectedSteer,
    argument,
    asked_strengths,
    doses_of,
    refuse_stream,
    rejecting,
)


def admit(params: Any, vllm_config: Any) -> tuple[Dose, ...]:
    """What a request takes, by its own ``steer`` value or by the config's default.

    Raises ``RejectedSteer`` if it cannot be served as it is steered.
    """
    plan = plan_of(vllm_config)
    if plan is None:
        return ()
    with rejecting():
        if argument(params, STREAM) is not None:
            refuse_stream()
        reports = asked_strengths(params)
        doses = doses_of(params, plan)
        if reports or is_dynamic(doses):
            _check_dynamic(doses, params, plan, vllm_config)
    return doses


def _check_dynamic(doses: tuple[Dose, ...], params: Any, plan: SteerPlan, vllm_config: Any) -> None:
    from vllm_steer.serving import dynamic_admission

    if is_dynamic(doses):
        dynamic_admission.check_engine_for(doses, plan, vllm_config)
        dynamic_admission.check_params_for(doses, params)
        enable_reporting(plan)
    else:
        dynamic_admission.check_served(f"leave {STRENGTHS} away")


def key_request(request: Any, vllm_config: Any) -> tuple[Dose, ...]:
    """Admit a request in the engine core, and give one whose steers change its KV a prefix-cache
    key of its own; the doses are returned.

    Requests of frontends that are not Python are checked here alone: ``RejectedSteer`` ends this
    request and leaves the engine running.
    """
    plan = plan_of(vllm_config)
    if plan is None or request.sampling_params is None:
        return ()
    doses = admit(request.sampling_params, vllm_config)
    if is_dynamic(doses):
        from vllm_steer.serving.dynamic_admission import check_input_for

        with rejecting():
            check_input_for(doses, plan, request)
    salt = steered_salt(request, doses, plan)
    if isinstance(salt, SteeredSalt) and getattr(request, "resumable", False):
        raise RejectedSteer(
            "steers inside the layers do not work with streaming input, whose prompt grows while "
            "its KV is kept; steer at the LM head, or 'none'"
        )
    request.cache_salt = salt
    return doses
