"""Means as in the papers: over the texts of a prompt, then over the prompts."""

import math
from collections.abc import Callable, Iterable, Sequence

from vllm_steer.evaluation.answers import Answers


def mean(values: Iterable[float]) -> float:
    """The mean of the values that are not NaN; NaN where there is none."""
    found = [value for value in values if not math.isnan(value)]
    return math.fsum(found) / len(found) if found else math.nan


def spread(values: Iterable[float]) -> float:
    """The population's standard deviation of the values that are not NaN; NaN where none is."""
    found = [value for value in values if not math.isnan(value)]
    middle = mean(found)
    return math.sqrt(mean((value - middle) ** 2 for value in found)) if found else math.nan


def mean_over_prompts(answers: Sequence[Answers], score: Callable[[str], float]) -> float:
    """The mean over prompts of the mean score of each prompt's texts."""
    return mean(mean(map(score, answer.texts)) for answer in answers)
