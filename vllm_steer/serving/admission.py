"""A request at the door: checked in the frontend, checked again and keyed in the engine core."""

from typing import Any

from vllm.exceptions import VLLMValidationError

from vllm_steer.doses import Dose
from vllm_steer.errors import SteerRequestError
from vllm_steer.plan import SteerPlan
from vllm_steer.serving.cache_key import SteeredSalt, steered_salt
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


def doses_of(sampling_params: Any, plan: SteerPlan) -> tuple[Dose, ...]:
    """A request's doses under the plan; none for an unsteered one."""
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


def key_request(request: Any, vllm_config: Any) -> None:
    """Give a request whose steers change its KV a prefix-cache key of its own.

    Also the door for frontends that are not Python: raises ``RejectedSteer`` as ``admit`` does,
    which ends this request and leaves the engine running.
    """
    admit(request.sampling_params, vllm_config)
    plan = plan_of(vllm_config)
    if plan is None or request.sampling_params is None:
        return
    salt = steered_salt(request, doses_of(request.sampling_params, plan), plan)
    if isinstance(salt, SteeredSalt) and getattr(request, "resumable", False):
        raise RejectedSteer(
            "steers inside the layers do not work with streaming input, whose prompt grows while "
            "its KV is kept; steer at the LM head, or 'none'"
        )
    request.cache_salt = salt
