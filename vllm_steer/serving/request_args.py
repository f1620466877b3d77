"""The steering arguments of a request: the user's, and those of streams.

A request with dynamic doses inside the layers is served as several streams of one text, each with
its own KV from the last prompt token on: the *main* one, which is the request itself; a *base* that
is never steered; and one *probe* for each dynamic dose, which takes that dose alone, always at its
maximum. Base and probes are requests of the engine's own making; ``extra_args[STREAM]`` says so and
is refused from anybody else.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, NoReturn

from vllm.exceptions import VLLMValidationError

from vllm_steer.doses import Dose
from vllm_steer.errors import SteerRequestError
from vllm_steer.foreign import shown
from vllm_steer.plan import SteerPlan

PARAMETER: Final = "vllm_xargs.steer"
STRENGTHS: Final = "steer_strengths"
STREAM: Final = "vllm_steer_stream"
_NO = (False, "false", "0")
_YES = (True, "true", "1")


class RejectedSteer(VLLMValidationError, SteerRequestError):
    """A bad ``steer`` value: HTTP 400 from a server, a ``ValueError`` from ``LLM``."""

    def __init__(self, message: str) -> None:
        super().__init__(message, parameter=PARAMETER)  # type: ignore[call-arg]


def asked_steer(sampling_params: Any) -> Any:
    """The request's own ``steer`` value, None if it does not ask."""
    return argument(sampling_params, "steer")


def asked_strengths(sampling_params: Any) -> bool:
    """Whether the request asks for the strengths that are computed for it.

    Raises ``SteerRequestError`` for a ``steer_strengths`` that is no boolean, in any of the ways
    that one may arrive: a server makes a number of JSON's ``true`` in ``vllm_xargs``.
    """
    return as_wish(argument(sampling_params, STRENGTHS))


def as_wish(given: Any) -> bool:
    """A ``steer_strengths`` value as a boolean; ``SteerRequestError`` if it is not one."""
    word = given.strip().lower() if isinstance(given, str) else given
    if word is None or word in _NO:
        return False
    if word in _YES:
        return True
    raise SteerRequestError(f"{STRENGTHS} is {shown(given)}; expected true or false")


def doses_of(sampling_params: Any, plan: SteerPlan) -> tuple[Dose, ...]:
    """A request's or a stream's doses under the plan; none for an unsteered one."""
    stream = stream_of(sampling_params)
    if stream is not None:
        return stream.doses(plan.doses(stream.steer))
    return plan.doses(asked_steer(sampling_params))


@contextmanager
def rejecting() -> Iterator[None]:
    """Make a ``SteerRequestError`` one that vLLM answers with HTTP 400."""
    try:
        yield
    except SteerRequestError as error:
        raise RejectedSteer(str(error)) from None


def refuse_stream() -> NoReturn:
    """Raise ``SteerRequestError`` for an argument that only requests of our own have."""
    raise SteerRequestError(
        f"{STREAM} is given, which belongs to vllm-steer's own requests; leave it away"
    )


@dataclass(frozen=True)
class Stream:
    """One base or probe stream.

    main   id of the request that it belongs to
    steer  that request's ``steer`` value
    dose   for a probe the index of its dose in that request's doses; None for the base
    """

    main: str
    steer: Any
    dose: int | None

    def to_args(self) -> dict[str, Any]:
        """Plain values for ``extra_args``, which travel to the workers."""
        return {"main": self.main, "steer": self.steer, "dose": self.dose}

    def doses(self, doses_of_main: Sequence[Dose]) -> tuple[Dose, ...]:
        """What the stream takes: nothing, or one dose at a constant strength, its maximum."""
        if self.dose is None:
            return ()
        return (replace(doses_of_main[self.dose], dynamic=None),)


def stream_of(sampling_params: Any) -> Stream | None:
    """The stream that a request of the engine's own making is; None for a user's request."""
    args = argument(sampling_params, STREAM)
    return None if args is None else Stream(**args)


def argument(sampling_params: Any, name: str) -> Any:
    """One of a request's extra arguments, None if it has not got it."""
    extra_args = getattr(sampling_params, "extra_args", None)
    return extra_args.get(name) if extra_args else None
