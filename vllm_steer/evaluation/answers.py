"""What was written under one setting, and what a judge says of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Answers:
    """One prompt and its continuations, in the order of their seeds; no text repeats the prompt."""

    prompt: str
    texts: tuple[str, ...]


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
