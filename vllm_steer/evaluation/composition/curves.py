"""Strength over tokens: measured for dynamic steers, stated for fixed and scheduled ones."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

from vllm_steer.evaluation.answers import Answers
from vllm_steer.evaluation.means import mean
from vllm_steer.steers import DeltaSteer, Steer
from vllm_steer.steers.schedules import schedule_curve


@dataclass(frozen=True)
class Curve:
    """Over the texts that reached a token: mean and quartiles of the strength, and their number."""

    mean: tuple[float, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    texts: tuple[int, ...]


def dynamic_curves(answers: Sequence[Answers]) -> dict[str, Curve]:
    """A curve for each dynamic steer; none where no strength was dynamic."""
    found: dict[str, list[Sequence[float]]] = {}
    for answer in answers:
        for strengths in answer.strengths:
            for name, values in strengths.items():
                found.setdefault(name, []).append(values)
    return {name: _curve(values) for name, values in found.items()}


def stated_curve(dose: Mapping[str, Any], steer: Steer, num_tokens: int) -> tuple[float, ...]:
    """The strength at each token of a dose that is not dynamic: see ``DeltaSteer``."""
    strength = float(dose["strength"])
    if not isinstance(steer, DeltaSteer):
        return (strength,) * num_tokens
    over = schedule_curve(dose.get("schedule", steer.schedule), steer.steps)
    return tuple(over.strength(strength, i) for i in range(num_tokens))


def raw(answers: Sequence[Answers]) -> dict[str, list[list[list[float]]]]:
    """Every strength by steer, prompt and text."""
    names = dict.fromkeys(name for a in answers for each in a.strengths for name in each)
    return {
        name: [[list(each.get(name, ())) for each in a.strengths] for a in answers]
        for name in names
    }


def _curve(texts: Sequence[Sequence[float]]) -> Curve:
    length = max(map(len, texts))
    at = [[values[i] for values in texts if i < len(values)] for i in range(length)]
    ends = [_quartiles(values) for values in at]
    return Curve(
        mean=tuple(map(mean, at)),
        lower=tuple(low for low, _ in ends),
        upper=tuple(high for _, high in ends),
        texts=tuple(map(len, at)),
    )


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile, interpolated between the values; both the value where one is."""
    if len(values) < 2:
        return (values[0], values[0]) if values else (math.nan, math.nan)
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, high
