"""Means as in the papers: over the texts of a prompt, then over the prompts."""

import math
from collections.abc import Callable, Iterable, Sequence

from vllm_steer.evaluation.answers import Answers


def mean(values: Iterable[float]) -> float:
    """The mean of the values that are not NaN; NaN where there is none."""
    numbers = [value for value in values if not math.isnan(value)]
    return math.fsum(numbers) / len(numbers) if numbers else math.nan


def spread(values: Iterable[float]) -> float:
    """The population's standard deviation of the values that are not NaN; NaN where none is."""
    numbers = [value for value in values if not math.isnan(value)]
    average = mean(numbers)
    return math.sqrt(mean((value - average) ** 2 for value in numbers)) if numbers else math.nan


def mean_over_prompts(answers: Sequence[Answers], score: Callable[[str], float]) -> float:
    """The mean over prompts of the mean score of each prompt's texts."""
    return mean(mean(map(score, answer.texts)) for answer in answers)
