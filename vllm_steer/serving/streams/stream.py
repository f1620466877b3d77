"""The streams of a dynamic request: which there are, and what each takes.

A request with dynamic doses inside the layers is served as several streams of one text, each with
its own KV from the last prompt token on: the *main* one, which is the request itself and takes its
doses at the strengths of its history; a *base* that is never steered; and one *probe* for each
dynamic dose, which takes that dose alone, always at its maximum. Base and probes are requests of
the engine's own making; ``extra_args[STREAM]`` says so and is refused from anybody else. A request
whose doses all act at the LM head needs none of them: its hidden state is the unsteered one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vllm_steer.doses import Dose

if TYPE_CHECKING:
    from vllm_steer.plan import SteerPlan

STREAM = "vllm_steer_stream"


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
    extra_args = getattr(sampling_params, "extra_args", None)
    args = extra_args.get(STREAM) if extra_args else None
    return None if args is None else Stream(**args)


def is_dynamic(doses: Sequence[Dose]) -> bool:
    """Whether any strength follows from the text."""
    return any(dose.dynamic for dose in doses)


def probed_doses(doses: Sequence[Dose], plan: "SteerPlan") -> tuple[int, ...]:
    """Indices of the dynamic doses that need a probe stream: those inside the layers."""
    return tuple(
        index
        for index, dose in enumerate(doses)
        if dose.dynamic and plan.steers[dose.steer].site != "head"
    )


def needs_streams(doses: Sequence[Dose], plan: "SteerPlan") -> bool:
    """Whether base and probe logits cannot be had from the request's own hidden state."""
    inside = any(plan.steers[dose.steer].site != "head" for dose in doses)
    return inside and is_dynamic(doses)


def num_streams(doses: Sequence[Dose], plan: "SteerPlan") -> int:
    """Requests of the engine that serve one request with these doses."""
    return 2 + len(probed_doses(doses, plan)) if needs_streams(doses, plan) else 1
