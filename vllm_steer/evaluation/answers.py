"""Generated texts, and the protocols of the judges that score them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

Strengths = Mapping[str, tuple[float, ...]]
"""The strength at each token of one text, by dynamic steer."""


@dataclass(frozen=True)
class Answers:
    """One prompt and its continuations, in the order of their seeds; texts exclude the prompt.

    ``strengths`` has the dynamic strengths of each text, in the same order; it is empty if no
    strength was dynamic.
    """

    prompt: str
    texts: tuple[str, ...]
    strengths: tuple[Strengths, ...] = ()


class Judge(Protocol):
    """Scores texts by one measure.

    ``name`` identifies the judge in the report and is unique. ``effect`` names the figure that
    measures how much of a property the texts have, in [0, 1]; None for a judge of fluency.
    """

    @property
    def name(self) -> str: ...

    @property
    def effect(self) -> str | None: ...

    def scores(self, answers: Sequence[Answers]) -> Mapping[str, float]:
        """Figures by name; NaN for a figure that these texts do not define."""
        ...


@runtime_checkable
class PropertyJudge(Judge, Protocol):
    """A judge that also decides for each text whether it has the property."""

    def verdicts(self, answers: Sequence[Answers]) -> list[list[float | None]]:
        """Verdicts by prompt and text: 1.0 has the property, 0.0 has not, None is undecided."""
        ...
