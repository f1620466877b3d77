"""Admission: checks a request in the frontend, and again in the engine core."""

from collections.abc import Sequence
from typing import Any, Final

from vllm_steer.doses import Dose, is_dynamic
from vllm_steer.errors import SteerRequestError
from vllm_steer.plan import SteerPlan
from vllm_steer.serving.cache_key import SteeredSalt, steered_salt
from vllm_steer.serving.plan_transport import plan_of
from vllm_steer.serving.reporting_state import enable_reporting
from vllm_steer.serving.request_args import (
    STEER,
    STREAM,
    STRENGTHS,
    RejectedSteer,
    argument,
    asks_for_prompt_logprobs,
    doses_of,
    reject_stream_argument,
    rejecting,
    wants_strengths,
)

_NO_STEER: Final[tuple[Any, ...]] = (None, "none", "", {})


def admit(params: Any, vllm_config: Any) -> tuple[Dose, ...]:
    """The doses of a request, from its ``steer`` value or the config's default.

    Raises ``RejectedSteer`` if the request cannot be served with these doses. An engine without a
    steer config has none; it is asked where another engine of its process has one.
    """
    plan = plan_of(vllm_config)
    if plan is None:
        _check_asks_for_none(params)
        return ()
    with rejecting(STREAM):
        if argument(params, STREAM) is not None:
            reject_stream_argument()
    with rejecting(STRENGTHS):
        reports = wants_strengths(params)
    with rejecting(STEER):
        doses = doses_of(params, plan)
        _check_gated(doses, params)
        if is_dynamic(doses):
            _check_dynamic(doses, params, plan, vllm_config)
    if reports and not is_dynamic(doses):
        from vllm_steer.serving.dynamic_admission import check_available

        with rejecting(STRENGTHS):
            check_available(f"remove {STRENGTHS}")
    return doses


def _check_asks_for_none(params: Any) -> None:
    if argument(params, STEER) not in _NO_STEER:
        raise RejectedSteer(
            "this engine was started without a steer config, so no steer can act; start it with "
            "--steer-config, or remove the steer"
        )


def reads_whole_prompt(doses: Sequence[Dose], plan: SteerPlan) -> bool:
    """Whether a condition of these doses is read at all tokens of the prompt."""
    return any(
        steer.condition is not None and steer.condition.tokens == "any"
        for dose in doses
        if dose.gate is not None
        for steer in plan.conditions_of(dose.gate)
    )


def _check_gated(doses: Sequence[Dose], params: Any) -> None:
    """Raise ``SteerRequestError`` if a request asks for what a verdict on its prompt changes."""
    gated = [dose.steer for dose in doses if dose.gate is not None]
    if gated and is_dynamic(doses):
        raise SteerRequestError(
            f"steer {', '.join(gated)} has 'when' beside a dynamic strength, which is computed in "
            "streams of the request that do not read its conditions; ask for fixed strengths"
        )
    if gated and asks_for_prompt_logprobs(params):
        raise SteerRequestError(
            f"steer {', '.join(gated)} has 'when': its conditions are known once the whole prompt "
            "is computed, hence there are no prompt logprobs under it; leave prompt_logprobs away"
        )


def _check_dynamic(doses: tuple[Dose, ...], params: Any, plan: SteerPlan, vllm_config: Any) -> None:
    from vllm_steer.serving.dynamic_admission import check_engine_for, check_params_for

    check_engine_for(doses, plan, vllm_config)
    check_params_for(doses, params)
    enable_reporting(plan)


def admit_and_set_cache_key(request: Any, vllm_config: Any) -> tuple[Dose, ...]:
    """Admit a request in the engine core, set its prefix-cache key, and return its doses.

    This is the only check of requests that bypass the Python frontend. ``RejectedSteer`` ends the
    request; the engine keeps running.
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
    is_gated = any(dose.gate is not None for dose in doses)
    if (is_gated or isinstance(salt, SteeredSalt)) and getattr(request, "resumable", False):
        raise RejectedSteer(
            "steers inside the layers and conditions do not work with streaming input, whose "
            "prompt grows while its KV stays cached; use steers at the LM head, or steer 'none'"
        )
    request.cache_salt = salt
    return doses
