"""A dose: one steer of one request, with its strength, layers, phase and schedule."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal, get_args

from vllm_steer.steers.schedules import Schedule, schedule_curve

Phase = Literal["all", "prompt", "generation", "text", "answer", "last"]
PHASES: Final[tuple[Phase, ...]] = get_args(Phase)

Kl = Literal["plain", "authors"]
KLS: Final[tuple[Kl, ...]] = get_args(Kl)

END: Final = 2**63 - 1
"""Behind the last token of every text."""

Needs = Literal["any", "all"]
"""How many of some conditions must hold."""

Bounds = tuple[int | None, int | None]
"""Those of a Python slice; None for an open end."""
Span = tuple[int, int]
"""The positions ``first <= p < last``."""


@dataclass(frozen=True)
class TokenWindows:
    """Some tokens of a request by index, in place of a phase.

    prompt   those of each slice ``prompt[first:last]``: negative indices count from the prompt's
             end
    answer   those at which the model chooses ``answer[first:last]``: index 0 is the last token of
             the prompt; without negative indices
    """

    prompt: tuple[Bounds, ...] = ()
    answer: tuple[Bounds, ...] = ()

    def spans(self, prompt_len: int) -> tuple[Span, ...]:
        """The positions, ascending; slices that touch or overlap are one span."""
        last_token = prompt_len - 1
        spans = [slice(*bounds).indices(prompt_len)[:2] for bounds in self.prompt]
        for first, last in self.answer:
            spans.append((last_token + (first or 0), END if last is None else last_token + last))
        merged: list[Span] = []
        for begin, end in sorted(span for span in spans if span[0] < span[1]):
            if merged and begin <= merged[-1][1]:
                begin, before = merged.pop()
                end = max(end, before)
            merged.append((begin, end))
        return tuple(merged)


@dataclass(frozen=True)
class Dynamic:
    """Options of a dynamic strength, see ``dynamic.strength``.

    top_p    the share of probability that the compared tokens cover, in (0, 1]
    kl       ``plain``, or divided by the number of compared tokens as the ``authors`` do
    """

    top_p: float = 0.5
    kl: Kl = "plain"


@dataclass(frozen=True)
class Gate:
    """The conditions, by name, that decide whether a dose acts: ``any`` or ``all`` must hold.

    ``keys`` are those of conditions that were loaded at run time, by name, see ``Dose.key``.
    """

    conditions: tuple[str, ...]
    needs: Needs = "any"
    keys: tuple[tuple[str, str], ...] = ()

    @property
    def entries(self) -> tuple[str, ...]:
        """The names of the conditions' entries in the device tables."""
        keys = dict(self.keys)
        return tuple(keys.get(name, name) for name in self.conditions)


@dataclass(frozen=True)
class Dose:
    """A steer's name and strength, and where in the request and in the model it acts.

    strength  with ``dynamic`` the maximum: strengths lie between 0 and it, whatever its sign
    layers    those of the steer's layers that it acts in; None for all of them
    phase     ``prompt`` tokens, tokens of the ``generation``, or ``all``: by what a token is;
              ``text`` is all but the placeholders of images, audio and video; by what a token leads
              to, ``answer``: from the last prompt token on, ``last``: that token alone; or windows
    schedule  of a delta steer; None for the other kinds
    dynamic   None where the strength is what the request says
    low, high the bounds of a projection or of a feature; None for what has none
    gate      None where the dose acts whatever the prompt is
    key       of a steer that was loaded at run time: what it is, whatever its name means by now
    """

    steer: str
    strength: float
    layers: tuple[int, ...] | None = None
    phase: Phase | TokenWindows = "all"
    schedule: Schedule | None = None
    dynamic: Dynamic | None = None
    low: float | None = None
    high: float | None = None
    gate: Gate | None = None
    key: str | None = None

    @property
    def entry(self) -> str:
        """The name of the steer's entry in the device tables."""
        return self.key or self.steer


def is_dynamic(doses: Iterable[Dose]) -> bool:
    """True if any dose has a dynamic strength."""
    return any(dose.dynamic for dose in doses)


def token_spans(dose: Dose, steps: int | None, prompt_len: int) -> tuple[Span, ...]:
    """The positions of the tokens that a dose touches, by phase and schedule: spans that are
    ascending, apart from each other and not empty. Of these, phase ``text`` leaves out
    placeholders.

    ``steps`` is that of a delta, None for the other kinds.
    """
    spans = _phase_spans(dose.phase, prompt_len)
    if steps is not None:
        first = prompt_len - 1
        last = first + schedule_curve(dose.schedule, steps).last
        spans = tuple((max(begin, first), min(end, last)) for begin, end in spans)
    return tuple(span for span in spans if span[0] < span[1])


def _phase_spans(phase: Phase | TokenWindows, prompt_len: int) -> tuple[Span, ...]:
    if isinstance(phase, TokenWindows):
        return phase.spans(prompt_len)
    last_token = prompt_len - 1
    span = {
        "all": (0, END),
        "text": (0, END),
        "prompt": (0, prompt_len),
        "generation": (prompt_len, END),
        "answer": (last_token, END),
        "last": (last_token, prompt_len),
    }[phase]
    return (span,)
