"""Generated texts, and the protocols of the judges that score them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

Strengths = Mapping[str, tuple[float, ...]]
"""The strength at each token of one text, by dynamic steer."""

OnText = Callable[[int], object]
"""Receives the number of texts that were scored so far."""


def ignore_count(count: int) -> None:
    """An ``OnText`` that does nothing."""


@dataclass(frozen=True)
class Answers:
    """One prompt and its continuations, in the order of their seeds; texts exclude the prompt.

    ``strengths`` has the dynamic strengths of each text, in the same order; it is empty if no
    strength was dynamic. ``num_tokens`` is the number of tokens that were generated for the texts,
    0 for texts from a file; equal answers may differ in it.
    """

    prompt: str
    texts: tuple[str, ...]
    strengths: tuple[Strengths, ...] = ()
    num_tokens: int = field(default=0, compare=False)


def num_texts(answers: Sequence[Answers]) -> int:
    """The number of texts of all prompts."""
    return sum(len(answer.texts) for answer in answers)


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
class TextJudge(Judge, Protocol):
    """A judge that finds something in each text, from which its figures are computed.

    ``scores(answers)`` is ``figures(observe(answers))``. Reports show the progress of such a judge
    and have standard errors of its figures, by the figures without some of the texts.
    """

    def observe(
        self, answers: Sequence[Answers], on_text: OnText = ignore_count
    ) -> Sequence[Sequence[Any]]:
        """An observation of each text, by prompt."""
        ...

    def figures(self, observations: Sequence[Sequence[Any]]) -> Mapping[str, float]:
        """Figures by name of some observations, by prompt."""
        ...


@runtime_checkable
class PropertyJudge(Judge, Protocol):
    """A judge that also decides for each text whether it has the property."""

    def verdicts(self, answers: Sequence[Answers]) -> list[list[float | None]]:
        """Verdicts by prompt and text: 1.0 has the property, 0.0 has not, None is undecided."""
        ...
