"""What steers a request: the header ``X-Steer`` of its answer, and ``applied_steers`` of an output.

A resolved dose is written as ``name:strength@0123456789ab`` with the first 12 digits of the digest
of the steer's content, or ``name:dynamic@...`` where the strength changes per token.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

from vllm_steer.config import NO_STEER
from vllm_steer.doses import Dose
from vllm_steer.plan import SteerPlan
from vllm_steer.serving.plan_transport import plan_of
from vllm_steer.serving.request_args import doses_of

HEADER: Final = "X-Steer"
ATTRIBUTE: Final = "applied_steers"
PLAN: Final = "steer_plan"
_DIGITS: Final = 12


@dataclass(frozen=True)
class AppliedSteer:
    """One resolved dose of a request.

    ``strength`` is a number, or ``dynamic``; ``digest`` is of the steer's content, see
    ``GET /v1/steers``.
    """

    name: str
    strength: float | Literal["dynamic"]
    digest: str

    def __str__(self) -> str:
        strength = self.strength if isinstance(self.strength, str) else format_number(self.strength)
        return f"{self.name}:{strength}@{self.digest[:_DIGITS]}"


def applied_steers(doses: Iterable[Dose], plan: SteerPlan) -> tuple[AppliedSteer, ...]:
    """What the doses of a request are, in their order."""
    return tuple(
        AppliedSteer(
            dose.steer, "dynamic" if dose.dynamic else dose.strength, plan.steer_of(dose).content
        )
        for dose in doses
    )


def header_value(doses: Iterable[Dose], plan: SteerPlan) -> str:
    """The value of ``X-Steer``: ``none`` for no doses."""
    return ",".join(map(str, applied_steers(doses, plan))) or NO_STEER


def format_number(number: float) -> str:
    """The shortest text that reads as the same number; no ``.0`` for a whole one."""
    text = repr(float(number))
    return text.removesuffix(".0")


def with_plan_for_outputs(
    original: Callable[..., Any], engine: Any, *args: Any, **kwargs: Any
) -> Any:
    """``LLMEngine`` and ``AsyncLLM``, whose output processor knows the plan."""
    original(engine, *args, **kwargs)
    setattr(engine.output_processor, PLAN, plan_of(engine.vllm_config))


def with_applied_of_request(
    original: Callable[..., Any], processor: Any, request: Any, *args: Any, **kwargs: Any
) -> Any:
    """``OutputProcessor.add_request``, whose request state knows what steers the request."""
    result = original(processor, request, *args, **kwargs)
    state = processor.request_states.get(request.request_id)
    plan: SteerPlan | None = getattr(processor, PLAN, None)
    if state is not None and plan is not None and request.sampling_params is not None:
        doses = doses_of(request.sampling_params, plan)
        setattr(state, ATTRIBUTE, applied_steers(doses, plan))
    return result


def with_applied_steers(original: Callable[..., Any], state: Any, *args: Any, **kwargs: Any) -> Any:
    """``RequestState._new_request_output``, whose output has ``applied_steers``."""
    output = original(state, *args, **kwargs)
    setattr(output, ATTRIBUTE, getattr(state, ATTRIBUTE, ()))
    return output
