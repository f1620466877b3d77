"""The share of texts with each property of a combination, and with all of them at once."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vllm_steer.errors import SteerError
from vllm_steer.evaluation.answers import Answers, Judge, PropertyJudge
from vllm_steer.evaluation.composition.spec import Combination, ComparisonSpec
from vllm_steer.evaluation.judges import make_judge
from vllm_steer.evaluation.means import mean
from vllm_steer.evaluation.standard_errors import ERROR, with_errors

Verdicts = Sequence[Sequence[bool]]
"""Verdicts by prompt and text."""


class PropertyJudges:
    """The judge of each property, with a cache of its verdicts by text set."""

    def __init__(self, spec: ComparisonSpec, judges: Mapping[str, PropertyJudge]) -> None:
        self._judges = judges
        self._targets = {name: 0.0 if p.opposite else 1.0 for name, p in spec.properties.items()}
        self._cache: dict[tuple[str, str], Verdicts] = {}

    def has(self, name: str, texts: str, answers: Sequence[Answers]) -> Verdicts:
        """Whether each text has the property; an undecided text has neither it nor its opposite."""
        if (name, texts) not in self._cache:
            target = self._targets[name]
            verdicts = self._judges[name].verdicts(answers)
            self._cache[name, texts] = [[verdict == target for verdict in row] for row in verdicts]
        return self._cache[name, texts]

    def has_all(self, names: Combination, texts: str, answers: Sequence[Answers]) -> Verdicts:
        """Whether each text has all the properties at once."""
        by_property = [self.has(name, texts, answers) for name in names]
        by_prompt = zip(*by_property, strict=True)
        return [[all(verdicts) for verdicts in zip(*rows, strict=True)] for rows in by_prompt]


def share(verdicts: Verdicts) -> float:
    """Mean over prompts of the share of true verdicts; NaN without texts."""
    return mean(mean(map(float, row)) for row in verdicts)


class ShareWithError(NamedTuple):
    """A share of texts, and its standard error; NaN for a single text."""

    share: float
    error: float


def share_with_error(verdicts: Verdicts) -> ShareWithError:
    """``share`` with its standard error."""
    figures = with_errors(lambda rows: {"share": share(rows)}, verdicts)
    return ShareWithError(figures["share"], figures.get("share" + ERROR, math.nan))


def property_judges(spec: ComparisonSpec) -> dict[str, PropertyJudge]:
    """A judge for each property.

    Raises ``SteerError`` for an invalid or unavailable judge, and for one without verdicts per
    text.
    """
    judges: dict[str, PropertyJudge] = {}
    for name, prop in spec.properties.items():
        judge: Judge = make_judge(prop.judge)
        if not isinstance(judge, PropertyJudge):
            raise SteerError(
                f"property {name}: judge {prop.judge} does not decide for each text whether it has "
                "the property; use classifier:MODEL:LABEL, language:CODE or lexicon:FILE"
            )
        judges[name] = judge
    return judges
