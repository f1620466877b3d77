"""Standard errors of figures, by the jackknife.

    error_G^2 = (g - 1)/g * sum_i (s_i - mean(s))^2
    error^2 = max(error_P^2 + error_S^2 - error_T^2, error_P^2, error_S^2)

``s_i`` is the figure without the texts of group ``i`` of ``g`` groups: for ``error_P`` those of one
prompt, for ``error_S`` those of one seed, which is the same for text ``k`` of every prompt, for
``error_T`` single texts. With more than 100 prompts, seeds or texts there are 100 groups of them.
Texts of one prompt are not independent, and where the prompts are alike neither are texts of one
seed. With one text per prompt the error is ``error_P``, for a mean its usual standard error.

A median and figures of the highest of a prompt's texts have no error: their jackknife does not
converge.

Sources: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 11; Cameron, Gelbach
and Miller, Robust Inference with Multiway Clustering (2011), for the sum.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from vllm_steer.evaluation.means import mean

ERROR: Final = "_error"
"""The end of the name of a figure's standard error."""

Observations = Sequence[Sequence[Any]]
"""An observation of each text, by prompt."""

_GROUPS: Final = 100
_WITHOUT_ERROR: Final = ("median", "max", "any")


def with_errors(
    figures: Callable[[Observations], Mapping[str, float]], observations: Observations
) -> dict[str, float]:
    """The figures of all texts, each followed by its standard error.

    The error of ``share`` is named ``share_error``; it is NaN if a figure without some texts is not
    finite. There are no errors for a single text.
    """
    values = figures(observations)
    by_prompt, by_seed, by_text = (
        [figures(part) for part in parts]
        for parts in (
            _without_each_group(observations),
            _without_seeds(observations),
            _without_texts(observations),
        )
    )
    result: dict[str, float] = {}
    for name, value in values.items():
        result[name] = value
        if (by_prompt or by_seed) and name not in _WITHOUT_ERROR:
            result[name + ERROR] = _over_prompts_and_seeds(
                *([part[name] for part in parts] for parts in (by_prompt, by_seed, by_text))
            )
    return result


def _over_prompts_and_seeds(
    by_prompt: Sequence[float], by_seed: Sequence[float], by_text: Sequence[float]
) -> float:
    prompts, seeds, texts = (
        jackknife_error(values) ** 2 if values else 0.0 for values in (by_prompt, by_seed, by_text)
    )
    if not by_prompt or not by_seed:
        return math.sqrt(prompts + seeds)
    if math.isnan(prompts + seeds + texts):
        return math.nan
    return math.sqrt(max(prompts + seeds - texts, prompts, seeds))


def jackknife_error(values: Sequence[float]) -> float:
    """The error by a figure's values without each group; NaN if one of them is not finite."""
    if not all(map(math.isfinite, values)):
        return math.nan
    middle = mean(values)
    count = len(values)
    return math.sqrt((count - 1) / count * math.fsum((value - middle) ** 2 for value in values))


def _without_seeds(observations: Observations) -> list[Observations]:
    """The observations without each group of seeds; none if there is one text per prompt."""
    by_prompt = [_without_each_group(texts) for texts in observations]
    if len(set(map(len, by_prompt))) != 1:
        return []  # not the same number of texts for every prompt
    return list(zip(*by_prompt, strict=True))


def _without_texts(observations: Observations) -> list[Observations]:
    """The observations without each group of texts; none unless all prompts have as many, at least
    two. Groups of more than one text are drawn at random, the same in each call.
    """
    counts = set(map(len, observations))
    if len(counts) != 1 or min(counts) < 2:
        return []
    per_prompt = counts.pop()
    total = per_prompt * len(observations)
    groups = min(_GROUPS, total)
    group_of = [index % groups for index in range(total)]
    random.Random(0).shuffle(group_of)
    return [
        [
            [
                text
                for seed, text in enumerate(texts)
                if group_of[prompt * per_prompt + seed] != group
            ]
            for prompt, texts in enumerate(observations)
        ]
        for group in range(groups)
    ]


def _without_each_group(items: Sequence[Any]) -> list[Any]:
    """The items without each group; none for a single item."""
    groups = min(len(items), _GROUPS)
    if groups < 2:
        return []
    return [
        [item for index, item in enumerate(items) if index % groups != group]
        for group in range(groups)
    ]
