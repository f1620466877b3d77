"""A dose: one steer of one request, with its strength, layers, phase and schedule."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal, get_args

from vllm_steer.steers.schedules import Schedule, schedule_curve

RequestPhase = Literal["all", "prompt", "generation", "text"]
"""What a request may ask for; ``answer`` belongs to strengths that change per token."""
Phase = Literal[RequestPhase, "answer"]
PHASES: Final[tuple[RequestPhase, ...]] = get_args(RequestPhase)

Kl = Literal["plain", "authors"]
KLS: Final[tuple[Kl, ...]] = get_args(Kl)


END: Final = 2**63 - 1
"""Behind the last token of every text."""


@dataclass(frozen=True)
class Dynamic:
    """Options of a dynamic strength, see ``dynamic.strength``.

    top_p    the share of probability that the compared tokens cover, in (0, 1]
    kl       ``plain``, or divided by the number of compared tokens as the ``authors`` do
    """

    top_p: float = 0.5
    kl: Kl = "plain"


@dataclass(frozen=True)
class Dose:
    """A steer's name and strength, and where in the request and in the model it acts.

    strength  with ``dynamic`` the maximum: strengths lie between 0 and it, whatever its sign
    layers    those of the steer's layers that it acts in; None for all of them
    phase     ``prompt`` tokens, tokens of the ``generation``, or ``all``: by what a token is;
              ``text`` is all but the placeholders of images, audio and video; ``answer`` from the
              last prompt token on
    schedule  of a delta steer; None for the other kinds
    dynamic   None where the strength is what the request says
    key       of a steer that was loaded at run time: what it is, whatever its name means by now
    """

    steer: str
    strength: float
    layers: tuple[int, ...] | None = None
    phase: Phase = "all"
    schedule: Schedule | None = None
    dynamic: Dynamic | None = None
    key: str | None = None

    @property
    def entry(self) -> str:
        """The name of the steer's entry in the device tables."""
        return self.key or self.steer


def is_dynamic(doses: Iterable[Dose]) -> bool:
    """True if any dose has a dynamic strength."""
    return any(dose.dynamic for dose in doses)


def token_span(dose: Dose, steps: int | None, prompt_len: int) -> tuple[int, int]:
    """The positions ``first <= p < last`` of the tokens that a dose touches, by phase and schedule.
    Of these, phase ``text`` leaves out placeholders.

    ``steps`` is that of a delta, None for the other kinds.
    """
    first, last = 0, END
    if dose.phase == "prompt":
        last = prompt_len
    elif dose.phase == "generation":
        first = prompt_len
    elif dose.phase == "answer":
        first = prompt_len - 1
    if steps is not None:
        num_steps = schedule_curve(dose.schedule, steps).last
        first, last = max(first, prompt_len - 1), min(last, prompt_len - 1 + num_steps)
    return first, last
