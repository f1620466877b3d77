"""Standard errors of figures, by the jackknife.

    error_P^2 = (g - 1)/g * sum_i (s_i - mean(s))^2            error = max(error_P, error_S)

``s_i`` is the figure without the texts of group ``i`` of ``g`` groups: for ``error_P`` those of one
prompt, for ``error_S`` those of one seed, which is the same for text ``k`` of every prompt. With
more than 100 prompts or seeds there are 100 groups of them. Texts of one prompt are not
independent, and where the prompts are alike neither are texts of one seed: the larger of the two
errors counts. For a mean over prompts, ``error_P`` is the usual standard error of a mean.

A median and figures of the highest of a prompt's texts have no error: their jackknife does not
converge.

Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 11.
"""

import math
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
    by_group = [
        [figures(part) for part in parts]
        for parts in (_without_each_group(observations), _without_seeds(observations))
        if parts
    ]
    result: dict[str, float] = {}
    for name, value in values.items():
        result[name] = value
        if by_group and name not in _WITHOUT_ERROR:
            errors = [jackknife_error([part[name] for part in parts]) for parts in by_group]
            result[name + ERROR] = math.nan if any(map(math.isnan, errors)) else max(errors)
    return result


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


def _without_each_group(items: Sequence[Any]) -> list[Any]:
    """The items without each group; none for a single item."""
    groups = min(len(items), _GROUPS)
    if groups < 2:
        return []
    return [
        [item for index, item in enumerate(items) if index % groups != group]
        for group in range(groups)
    ]
