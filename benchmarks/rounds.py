"""Interleaved measurements, and percentiles of their results.

A *leg* is one measured run. Every leg of a case lies between two legs of its baseline (A B A C A
...); these three are a *round*, and the ratio of a figure in it is ``B / ((A before + A after) /
2)``, which removes a drift of the machine.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Leg = TypeVar("Leg")
Figure = Callable[[Any], float]


@dataclass(frozen=True)
class Round(Generic[Leg]):
    """A leg of a case between two baseline legs."""

    before: Leg
    other: Leg
    after: Leg

    def plain(self, figure: Figure) -> float:
        """The mean of both baseline legs."""
        return (figure(self.before) + figure(self.after)) / 2

    def ratio(self, figure: Figure) -> float:
        """The case over the baseline."""
        return figure(self.other) / self.plain(figure)


def interleave(
    plain: Callable[[], Leg],
    others: Mapping[Any, Callable[[], Leg]],
    count: int,
    *,
    warm_up: bool = True,
) -> dict[Any, list[Round[Leg]]]:
    """Run ``count`` rounds of every case; neighbouring rounds share a baseline leg."""
    for leg in (plain, *others.values()) if warm_up else ():
        leg()
    rounds: dict[Any, list[Round[Leg]]] = {key: [] for key in others}
    before = plain()
    for key in list(others) * count:
        other, after = others[key](), plain()
        rounds[key].append(Round(before, other, after))
        before = after
    return rounds


def plain_legs(rounds: Sequence[Round[Leg]]) -> list[Leg]:
    """The baseline legs before and after one case."""
    return list(dict.fromkeys(leg for pair in rounds for leg in (pair.before, pair.after)))


def spread(name: str, values: Sequence[float], *, middle: str = "") -> dict[str, float]:
    """Median, 20th and 80th percentile, as columns of a line."""
    ordered = sorted(values)
    shares = {middle: 0.5, "_p20": 0.2, "_p80": 0.8}
    return {f"{name}{end}": round(quantile(ordered, share), 4) for end, share in shares.items()}


def median(values: Sequence[float]) -> float:
    """The median, to four places."""
    return round(statistics.median(values), 4)


def quantile(ordered: Sequence[float], share: float) -> float:
    """Linear interpolation between the two nearest values."""
    rank = share * (len(ordered) - 1)
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)
