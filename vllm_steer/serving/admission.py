"""A request at the door: checked in the frontend, checked again and keyed in the engine core."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from vllm.exceptions import VLLMValidationError

from vllm_steer.doses import Dose
from vllm_steer.errors import SteerRequestError
from vllm_steer.foreign import shown
from vllm_steer.plan import SteerPlan
from vllm_steer.serving.cache_key import SteeredSalt, steered_salt
from vllm_steer.serving.dynamic_admission import (
    check_engine_for,
    check_input_for,
    check_params_for,
)
from vllm_steer.serving.engine_config import plan_of
from vllm_steer.serving.reports.expectation import expect_strengths
from vllm_steer.serving.streams.stream import STREAM, is_dynamic, stream_of

PARAMETER = "vllm_xargs.steer"
STRENGTHS = "steer_strengths"
_NO = (False, "false", "0")
_YES = (True, "true", "1")


class RejectedSteer(VLLMValidationError, SteerRequestError):
    """A bad ``steer`` value: HTTP 400 from a server, a ``ValueError`` from ``LLM``."""

    def __init__(self, message: str) -> None:
        super().__init__(message, parameter=PARAMETER)  # type: ignore[call-arg]


def asked_steer(sampling_params: Any) -> Any:
    """The request's own ``steer`` value, None if it does not ask."""
    return _argument(sampling_params, "steer")


def asked_strengths(sampling_params: Any) -> bool:
    """Whether the request wants to be told the strengths that were worked out for it.

    Raises ``SteerRequestError`` for a ``steer_strengths`` that is no boolean, in any of the ways
    that one may arrive: a server makes a number of JSON's ``true`` in ``vllm_xargs``.
    """
    return as_wish(_argument(sampling_params, STRENGTHS))


def as_wish(given: Any) -> bool:
    """A ``steer_strengths`` value as a boolean; ``SteerRequestError`` if it is not one."""
    word = given.strip().lower() if isinstance(given, str) else given
    if word is None or word in _NO:
        return False
    if word in _YES:
        return True
    raise SteerRequestError(f"{STRENGTHS} is {shown(given)}; true or false is wanted")


def doses_of(sampling_params: Any, plan: SteerPlan) -> tuple[Dose, ...]:
    """A request's or a stream's doses under the plan; none for an unsteered one."""
    stream = stream_of(sampling_params)
    if stream is not None:
        return stream.doses(plan.doses(stream.steer))
    return plan.doses(asked_steer(sampling_params))


def admit(params: Any, vllm_config: Any) -> None:
    """Raise ``RejectedSteer`` if a request cannot be served as it is steered, by its own ``steer``
    value or by the config's default.
    """
    plan = plan_of(vllm_config)
    if plan is None:
        return
    with _rejecting():
        if _argument(params, STREAM) is not None:
            refuse_stream()
        asked_strengths(params)
        doses = doses_of(params, plan)
        if is_dynamic(doses):
            check_engine_for(doses, plan, vllm_config)
            check_params_for(doses, params)
            expect_strengths(plan)


def refuse_stream() -> NoReturn:
    """Raise ``SteerRequestError`` for an argument that only requests of our own have."""
    raise SteerRequestError(
        f"{STREAM} is given, which belongs to vllm-steer's own requests; leave it away"
    )


def key_request(request: Any, vllm_config: Any) -> None:
    """Give a request whose steers change its KV a prefix-cache key of its own.

    Also the door for frontends that are not Python: raises ``RejectedSteer`` as ``admit`` does,
    which ends this request and leaves the engine running.
    """
    plan = plan_of(vllm_config)
    if plan is None or request.sampling_params is None:
        return
    admit(request.sampling_params, vllm_config)
    doses = doses_of(request.sampling_params, plan)
    if is_dynamic(doses):
        with _rejecting():
            check_input_for(doses, plan, request)
    salt = steered_salt(request, doses, plan)
    if isinstance(salt, SteeredSalt) and getattr(request, "resumable", False):
        raise RejectedSteer(
            "steers inside the layers do not work with streaming input, whose prompt grows while "
            "its KV is kept; steer at the LM head, or 'none'"
        )
    request.cache_salt = salt


def key_stream(stream: Any, plan: SteerPlan) -> None:
    """The same for a base or a probe, a request of the engine's own making.

    The base shares its blocks with everybody, a probe with every probe of the like.
    """
    stream.cache_salt = steered_salt(stream, doses_of(stream.sampling_params, plan), plan)


@contextmanager
def _rejecting() -> Iterator[None]:
    try:
        yield
    except SteerRequestError as error:
        raise RejectedSteer(str(error)) from None


def _argument(sampling_params: Any, name: str) -> Any:
    """One of a request's extra arguments, None if it has not got it."""
    extra_args = getattr(sampling_params, "extra_args", None)
    return extra_args.get(name) if extra_args else None
