"""Means over prompts, as in the papers: first over the texts of a prompt, then over the prompts."""

import math
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TypeVar

from vllm_steer.evaluation.answers import Answers

T = TypeVar("T")


def mean(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN; NaN if there are none."""
    numbers = [value for value in values if not math.isnan(value)]
    return math.fsum(numbers) / len(numbers) if numbers else math.nan


def spread(values: Iterable[float]) -> float:
    """Population standard deviation of the values that are not NaN; NaN if there are none."""
    numbers = [value for value in values if not math.isnan(value)]
    average = mean(numbers)
    return math.sqrt(mean((value - average) ** 2 for value in numbers)) if numbers else math.nan


def by_prompt(values: Iterable[T], answers: Sequence[Answers]) -> list[list[T]]:
    """Group one value per text by prompt."""
    remaining = iter(values)
    return [list(islice(remaining, len(answer.texts))) for answer in answers]
