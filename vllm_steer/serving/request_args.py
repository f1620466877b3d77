"""The steering arguments of a request: the user's, and those of streams.

A request with dynamic doses inside the layers is served by several streams with the same tokens,
each with its own KV from the last prompt token on: the *main* stream, which is the request itself;
a *base* that is not steered; and one *probe* per dynamic dose, steered by that dose alone at its
maximum. The engine core creates base and probes; ``extra_args[STREAM]`` marks them and is rejected
in user requests.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Final, NoReturn

from vllm.exceptions import VLLMValidationError

from vllm_steer.doses import Dose
from vllm_steer.errors import SteerRequestError
from vllm_steer.plan import SteerPlan
from vllm_steer.untrusted_text import shown

ARGUMENTS: Final = "vllm_xargs"
STEER: Final = "steer"
STRENGTHS: Final = "steer_strengths"
STREAM: Final = "vllm_steer_stream"
LOADED: Final = "vllm_steer_loaded"
"""Set by the frontend: the keys of the request's steers that were loaded at run time, by name."""
_FALSE = (False, "false", "0")
_TRUE = (True, "true", "1")


SENT_FIELDS: ContextVar[Mapping[str, str] | None] = ContextVar(
    "vllm_steer_client_fields", default=None
)
"""By argument, the field of the HTTP body in which the client sent it; set by the middleware."""


FRONTEND_LOADED: ContextVar[Mapping[str, str] | None] = ContextVar(
    "vllm_steer_loaded_names", default=None
)
"""The same in the frontend, while a request is on its way in and has no argument ``LOADED`` yet."""


class RejectedSteer(VLLMValidationError, SteerRequestError):
    """A request that cannot be steered: HTTP 400 from a server, a ``ValueError`` from ``LLM``.

    ``argument`` is the argument at fault: ``STEER``, ``STRENGTHS`` or ``STREAM``. The answer's
    ``param`` is the field in which the client sent it.
    """

    def __init__(self, message: str, argument: str = STEER) -> None:
        fields = SENT_FIELDS.get() or {}
        parameter = fields.get(argument, f"{ARGUMENTS}.{argument}")
        super().__init__(message, parameter=parameter)  # type: ignore[call-arg]


def steer_argument(sampling_params: Any) -> Any:
    """The request's ``steer`` value; None if it has none."""
    return argument(sampling_params, STEER)


def wants_strengths(sampling_params: Any) -> bool:
    """True if the request asks for its dynamic strengths in the output.

    Raises ``SteerRequestError`` for a ``steer_strengths`` that is not a boolean. A server converts
    JSON's ``true`` in ``vllm_xargs`` to a number, so 0 and 1 are booleans too.
    """
    return parse_boolean(argument(sampling_params, STRENGTHS))


def parse_boolean(value: Any) -> bool:
    """A ``steer_strengths`` value as a boolean; ``SteerRequestError`` if it is not one."""
    word = value.strip().lower() if isinstance(value, str) else value
    if word is None or word in _FALSE:
        return False
    if word in _TRUE:
        return True
    raise SteerRequestError(f"{STRENGTHS} is {shown(value)}; expected true or false")


def doses_of(sampling_params: Any, plan: SteerPlan) -> tuple[Dose, ...]:
    """The doses of a request or a stream under the plan; empty for an unsteered one."""
    stream = stream_of(sampling_params)
    if stream is not None:
        return stream.doses(plan.doses(stream.steer, stream.loaded))
    return plan.doses(steer_argument(sampling_params), loaded_argument(sampling_params))


def loaded_argument(sampling_params: Any) -> Mapping[str, str] | None:
    """By name, the keys of the request's steers that were loaded at run time."""
    in_frontend = FRONTEND_LOADED.get()
    return argument(sampling_params, LOADED) if in_frontend is None else in_frontend


@contextmanager
def rejecting(argument: str = STEER) -> Iterator[None]:
    """Convert a ``SteerRequestError`` to a ``RejectedSteer``, which vLLM answers with HTTP 400."""
    try:
        yield
    except SteerRequestError as error:
        raise RejectedSteer(str(error), argument) from None


def reject_stream_argument() -> NoReturn:
    """Raise ``SteerRequestError`` for an argument that is reserved for streams."""
    raise SteerRequestError(
        f"{STREAM} is given and is reserved for the engine's own requests; remove it"
    )


def asks_for_prompt_logprobs(params: Any) -> bool:
    """Whether a request asks for logprobs of its prompt's tokens, in either way of vLLM's."""
    fields = ("prompt_logprobs", "prompt_logprob_token_ids")
    return any(getattr(params, field, None) is not None for field in fields)


@dataclass(frozen=True)
class StreamRequest:
    """One base or probe stream.

    main   id of the request that the stream belongs to
    steer  the ``steer`` value of that request
    dose   of a probe, the index of its dose among that request's doses; None for the base
    loaded the keys of that request's steers that were loaded at run time, by name
    """

    main: str
    steer: Any
    dose: int | None
    loaded: Mapping[str, str] | None = None

    def to_args(self) -> dict[str, Any]:
        """Plain values for ``extra_args``, which vLLM sends to the workers."""
        args = {"main": self.main, "steer": self.steer, "dose": self.dose}
        return {**args, "loaded": dict(self.loaded)} if self.loaded else args

    def doses(self, doses_of_main: Sequence[Dose]) -> tuple[Dose, ...]:
        """The stream's doses: none for a base, one at its maximum strength for a probe."""
        if self.dose is None:
            return ()
        return (replace(doses_of_main[self.dose], dynamic=None),)


def stream_of(sampling_params: Any) -> StreamRequest | None:
    """The stream that a request is; None for a user's request."""
    args = argument(sampling_params, STREAM)
    return None if args is None else StreamRequest(**args)


def argument(sampling_params: Any, name: str) -> Any:
    """One of a request's extra arguments; None if it is missing."""
    extra_args = getattr(sampling_params, "extra_args", None)
    return extra_args.get(name) if extra_args else None
