"""Strength over tokens: measured for dynamic strengths, computed for fixed and scheduled ones."""

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
    """Mean and quartiles of the strength at each token, and the number of texts that reach it."""

    mean: tuple[float, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    texts: tuple[int, ...]


def dynamic_curves(answers: Sequence[Answers]) -> dict[str, Curve]:
    """One curve per dynamic steer; empty if no strength was dynamic."""
    texts_by_steer: dict[str, list[Sequence[float]]] = {}
    for answer in answers:
        for strengths in answer.strengths:
            for name, values in strengths.items():
                texts_by_steer.setdefault(name, []).append(values)
    return {name: _curve(values) for name, values in texts_by_steer.items()}


def scheduled_curve(dose: Mapping[str, Any], steer: Steer, num_tokens: int) -> tuple[float, ...]:
    """The strength at each token of a fixed or scheduled dose, see ``DeltaSteer``."""
    strength = float(dose["strength"])
    if not isinstance(steer, DeltaSteer):
        return (strength,) * num_tokens
    schedule = schedule_curve(dose.get("schedule", steer.schedule), steer.steps)
    return tuple(schedule.strength(strength, i) for i in range(num_tokens))


def raw_strengths(answers: Sequence[Answers]) -> dict[str, list[list[list[float]]]]:
    """All strengths by steer, prompt, text and token."""
    names = dict.fromkeys(name for a in answers for strengths in a.strengths for name in strengths)
    return {
        name: [[list(strengths.get(name, ())) for strengths in a.strengths] for a in answers]
        for name in names
    }


def _curve(texts: Sequence[Sequence[float]]) -> Curve:
    length = max(map(len, texts))
    values_at = [[values[i] for values in texts if i < len(values)] for i in range(length)]
    quartiles = [_quartiles(values) for values in values_at]
    return Curve(
        mean=tuple(map(mean, values_at)),
        lower=tuple(low for low, _ in quartiles),
        upper=tuple(high for _, high in quartiles),
        texts=tuple(map(len, values_at)),
    )


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile with linear interpolation; a single value is both."""
    if len(values) < 2:
        return (values[0], values[0]) if values else (math.nan, math.nan)
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, high
