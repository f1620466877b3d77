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
    candidate,
    choices,
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
    best: Mapping[Combination, Choice]
    tried: Sequence[tuple[Candidate, SelectionScores]]


class StrengthSelection:
    """Chooses for every method, on texts of ``part``: the choosing prompts' or the test's own."""

    def __init__(
        self,
        asked: ComparisonSpec,
        steers: Mapping[str, Steer],
        tolerance: float,
        part: Part = "choosing",
    ) -> None:
        self._tolerance = tolerance
        self._part = part
        self._seen = asked.seen
        self._spaces: dict[Method, list[Choice]] = {
            method: choices(method, asked, steers)
            for method in asked.methods
            if any(skip_reason(method, c, asked, steers) is None for c in asked.seen)
        }

    @property
    def candidates(self) -> list[Candidate]:
        """The texts to choose on, each once; none of a method that has a single choice."""
        found = {
            each.name: each
            for method, space in self._spaces.items()
            if len(space) > 1
            for choice in space
            for combination in self._seen
            for each in [candidate(self._part, combination, choice)]
        }
        return list(found.values())

    def chosen(self, tried: Sequence[tuple[Candidate, SelectionScores]]) -> SelectedStrengths:
        """The choices, from the figures of all ``candidates``."""
        by_name = {each.name: figures for each, figures in tried}

        def measure(choice: Choice, combination: Combination) -> SelectionScores:
            return by_name[candidate(self._part, combination, choice).name]

        def best(method: Method, combinations: Sequence[Combination]) -> Choice:
            return choose(self._spaces[method], combinations, measure, self._tolerance)

        return SelectedStrengths(
            {method: best(method, self._seen) for method in self._spaces},
            {c: best("fixed", [c]) for c in self._seen if "fixed" in self._spaces},
            tried,
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
        raise SteerError("there is nothing to choose from, or nothing to choose on")
    if len(options) == 1:
        return options[0]
    found = [_over([measure(option, c) for c in combinations]) for option in options]
    enough = max(each.accuracy for each in found) - tolerance
    allowed = [place for place, each in enumerate(found) if each.accuracy >= enough]
    return options[min(allowed, key=lambda place: found[place].perplexity)]


def _over(each: Sequence[SelectionScores]) -> SelectionScores:
    logs = [math.inf if math.isnan(f.perplexity) else math.log(f.perplexity) for f in each]
    return SelectionScores(mean(f.accuracy for f in each), _exp(mean(logs)))


def _exp(value: float) -> float:
    return math.inf if value > 700 else math.exp(value)
