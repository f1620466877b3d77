"""Selects one set of strengths and options per method, on the seen combinations.

For a choice ``c`` of a method, over the seen combinations ``S`` to which the method applies:

    accuracy(c)   = mean over S of the share of texts with all the properties at once
    perplexity(c) = exp(mean over S of ln(total perplexity))

Among the choices whose accuracy is at most ``tolerance`` below the highest one, the first one with
the lowest perplexity is selected. The rule is the same for every method.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vllm_steer.errors import SteerError
from vllm_steer.evaluation.composition.candidates import (
    Candidate,
    Choice,
    Part,
    choices,
    make_candidate,
    skip_reason,
)
from vllm_steer.evaluation.composition.spec import Combination, ComparisonSpec, Method
from vllm_steer.evaluation.means import mean
from vllm_steer.steers import Steer


@dataclass(frozen=True)
class SelectionScores:
    """The criteria of the selection: accuracy and perplexity."""

    accuracy: float
    perplexity: float


Measure = Callable[[Choice, Combination], SelectionScores]


@dataclass(frozen=True)
class SelectedStrengths:
    """The result of the selection.

    ``methods`` has the choice of each method that applies to a seen combination, ``best_fixed`` the
    best fixed strengths of each seen combination by itself, ``measurements`` all scores.
    """

    methods: Mapping[Method, Choice]
    best_fixed: Mapping[Combination, Choice]
    measurements: Sequence[tuple[Candidate, SelectionScores]]


class StrengthSelection:
    """Selects a choice per method, on texts of ``part``: selection prompts or test prompts."""

    def __init__(
        self,
        spec: ComparisonSpec,
        steers: Mapping[str, Steer],
        tolerance: float,
        part: Part = "choosing",
    ) -> None:
        self._tolerance = tolerance
        self._part = part
        self._seen = spec.seen
        self._spaces: dict[Method, list[Choice]] = {
            method: choices(method, spec, steers)
            for method in spec.methods
            if any(skip_reason(method, c, spec, steers) is None for c in spec.seen)
        }

    @property
    def candidates(self) -> list[Candidate]:
        """The text sets to score, without duplicates; none for a method with a single choice."""
        unique = {
            candidate.name: candidate
            for method, space in self._spaces.items()
            if len(space) > 1
            for choice in space
            for combination in self._seen
            for candidate in [make_candidate(self._part, combination, choice)]
        }
        return list(unique.values())

    def select(
        self, measurements: Sequence[tuple[Candidate, SelectionScores]]
    ) -> SelectedStrengths:
        """Select the choices, given the scores of all ``candidates``."""
        by_name = {candidate.name: figures for candidate, figures in measurements}

        def measure(choice: Choice, combination: Combination) -> SelectionScores:
            return by_name[make_candidate(self._part, combination, choice).name]

        def best(method: Method, combinations: Sequence[Combination]) -> Choice:
            return choose(self._spaces[method], combinations, measure, self._tolerance)

        return SelectedStrengths(
            {method: best(method, self._seen) for method in self._spaces},
            {c: best("fixed", [c]) for c in self._seen if "fixed" in self._spaces},
            measurements,
        )


def choose(
    options: Sequence[Choice],
    combinations: Sequence[Combination],
    measure: Measure,
    tolerance: float,
) -> Choice:
    """The best choice over some combinations; the module's docstring has the rule.

    An undefined perplexity (NaN) counts as infinite. Raises ``SteerError`` without choices or
    without combinations.
    """
    if not options or not combinations:
        raise SteerError("there are no strengths to select from, or no combinations to select on")
    if len(options) == 1:
        return options[0]
    scores = [_mean_scores([measure(option, c) for c in combinations]) for option in options]
    threshold = max(candidate.accuracy for candidate in scores) - tolerance
    eligible = [index for index, candidate in enumerate(scores) if candidate.accuracy >= threshold]
    return options[min(eligible, key=lambda index: scores[index].perplexity)]


def _mean_scores(candidate: Sequence[SelectionScores]) -> SelectionScores:
    logs = [math.inf if math.isnan(f.perplexity) else math.log(f.perplexity) for f in candidate]
    return SelectionScores(mean(f.accuracy for f in candidate), _exp(mean(logs)))


def _exp(value: float) -> float:
    return math.inf if value > 700 else math.exp(value)
