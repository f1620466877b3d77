"""A request at the door: checked in the frontend, checked again and keyed in the engine core."""

from typing import Any

from vllm.exceptions import VLLMValidationError

from vllm_steer.errors import SteerRequestError
from vllm_steer.plan import SteerPlan
from vllm_steer.serving.engine_config import plan_of

PARAMETER = "vllm_xargs.steer"


class RejectedSteer(VLLMValidationError, SteerRequestError):
    """A bad ``steer`` value: HTTP 400 from a server, a ``ValueError`` from ``LLM``."""

    def __init__(self, message: str) -> None:
        super().__init__(message, parameter=PARAMETER)  # type: ignore[call-arg]


def asked_steer(sampling_params: Any) -> Any:
    """The request's own ``steer`` value, None if it does not ask."""
    extra_args = getattr(sampling_params, "extra_args", None)
    return extra_args.get("steer") if extra_args else None


def doses_of(sampling_params: Any, plan: SteerPlan) -> dict[str, float]:
    """Steer names to strengths for a request under the plan; empty for an unsteered one."""
    return plan.doses(asked_steer(sampling_params))


def admit(params: Any, vllm_config: Any) -> None:
    """Raise ``RejectedSteer`` if a request's ``steer`` value cannot be served."""
    plan = plan_of(vllm_config)
    if plan is None or asked_steer(params) is None:
        return
    try:
        doses_of(params, plan)
    except SteerRequestError as error:
        raise RejectedSteer(str(error)) from None


def salt_cache_key(request: Any, vllm_config: Any) -> None:
    """Give a request whose steers change its KV a prefix-cache key of its own.

    Also the door for frontends that are not Python: raises ``RejectedSteer`` as ``admit`` does,
    which ends this request and leaves the engine running.
    """
    admit(request.sampling_params, vllm_config)
    plan = plan_of(vllm_config)
    if plan is None or request.sampling_params is None:
        return
    digest = kv_digest(doses_of(request.sampling_params, plan), plan)
    if digest:
        request.cache_salt = f"{request.cache_salt or ''}|steer:{digest}"


def kv_digest(doses: dict[str, float], plan: SteerPlan) -> str:
    """What of the request's steers its KV depends on; empty if nothing.

    A steer at the head acts after the last layer: its requests share prefixes with all others.
    """
    return ",".join(
        f"{plan.steers[name].sha256}:{strength!r}"
        for name, strength in sorted(doses.items())
        if plan.steers[name].site != "head"
    )
