"""The texts of one setting, and the judges' figures for them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

Strengths = Mapping[str, tuple[float, ...]]
"""By a dynamic steer's name its strength at each token of one text."""


@dataclass(frozen=True)
class Answers:
    """One prompt and its continuations, in the order of their seeds; no text repeats the prompt.

    ``strengths`` has those of each text, in the same order, if any was dynamic; else it is empty.
    """

    prompt: str
    texts: tuple[str, ...]
    strengths: tuple[Strengths, ...] = ()


class Judge(Protocol):
    """Scores of texts by one measure.

    ``name`` is what the report calls it: never another judge's name. ``effect`` names the figure
    that says how much of a property the texts have, in [0, 1]; None for a judge of fluency.
    """

    @property
    def name(self) -> str: ...

    @property
    def effect(self) -> str | None: ...

    def scores(self, answers: Sequence[Answers]) -> Mapping[str, float]:
        """Figures by name; NaN where the texts give none."""
        ...


@runtime_checkable
class PropertyJudge(Judge, Protocol):
    """A judge that answers for each text by itself whether it has the property."""

    def verdicts(self, answers: Sequence[Answers]) -> list[list[float | None]]:
        """By prompt and text: 1.0 has it, 0.0 has not, None where the judge cannot tell."""
        ...
