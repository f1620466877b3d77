"""Selects one set of strengths and options per method, on the seen combinations.

For a choice ``c`` of a method, over the seen combinations ``S`` that the method has:

    accuracy(c)   = mean over S of the share of texts that have all the properties at once
    perplexity(c) = exp(mean over S of ln(total perplexity))

Of the choices whose accuracy is at most ``tolerance`` below the highest one, that of the lowest
perplexity is taken, and of equals the first: the same rule for every method.
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
    """What decides: accuracy, and perplexity as its price."""

    accuracy: float
    perplexity: float


Measure = Callable[[Choice, Combination], SelectionScores]


@dataclass(frozen=True)
class SelectedStrengths:
    """What was chosen and on what.

    ``methods`` has the choice of each method that any seen combination has, ``best`` the fixed
    strengths that are best for each seen combination by itself, ``tried`` what was measured.
    """

    methods: Mapping[Method, Choice]
    best_fixed: Mapping[Combination, Choice]
    measurements: Sequence[tuple[Candidate, SelectionScores]]


class StrengthSelection:
    """Chooses for every method, on texts of ``part``: the choosing prompts' or the test's own."""

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
        """The texts to choose on, each once; none of a method that has a single choice."""
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
        """The choices, from the figures of all ``candidates``."""
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
    """The best of some choices over some combinations, see the module.

    A text of no perplexity (NaN) is as bad as one of an infinite one. Raises ``SteerError`` where
    nothing is there to choose on.
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
