"""Standard errors of figures over prompts, by the jackknife.

    error^2 = (g - 1)/g * sum_i (s_i - mean(s))^2

with ``s_i`` the figure without the prompts of group ``i`` of ``g``: each prompt by itself, or up to
100 groups of equal size (up to one). For a mean over prompts, each by itself, this is the usual
standard error of a mean. All texts of a prompt are one observation, because they are not
independent. A median has no error: its jackknife does not converge.

Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 11.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from vllm_steer.evaluation.means import mean

ERROR: Final = "_error"
"""The end of the name of a figure's standard error."""

_GROUPS: Final = 100
_WITHOUT_ERROR: Final = ("median",)


def with_errors(
    figures: Callable[[Sequence[Any]], Mapping[str, float]], observations: Sequence[Any]
) -> dict[str, float]:
    """The figures of one observation per prompt, each followed by its standard error.

    The error of ``share`` is named ``share_error``; it is NaN if a figure without some prompts is
    not finite. There are no errors for fewer than two prompts.
    """
    values = figures(observations)
    if len(observations) < 2:
        return dict(values)
    parts = [figures(part) for part in _parts(observations)]
    result: dict[str, float] = {}
    for name, value in values.items():
        result[name] = value
        if name not in _WITHOUT_ERROR:
            result[name + ERROR] = jackknife_error([part[name] for part in parts])
    return result


def jackknife_error(values: Sequence[float]) -> float:
    """The error by a figure's values without each group; NaN if one of them is not finite."""
    if not all(map(math.isfinite, values)):
        return math.nan
    middle = mean(values)
    count = len(values)
    return math.sqrt((count - 1) / count * math.fsum((value - middle) ** 2 for value in values))


def _parts(observations: Sequence[Any]) -> Iterator[list[Any]]:
    """The observations without each group."""
    groups = min(len(observations), _GROUPS)
    for group in range(groups):
        yield [
            observation for index, observation in enumerate(observations) if index % groups != group
        ]
