"""Legs of stock vLLM between legs of each case, and the ratios of their figures.

A *leg* is one run of a benchmark and gives named figures. In ``alternate`` every leg of a case
has a stock leg before and after it (A B A C A ...); these three are a *round*, and a figure's ratio
in it is ``case / ((before + after) / 2)``, which takes out a drift of the machine.
"""

import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Figures = dict[str, float]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Round:
    """A leg of a case between two legs of stock vLLM."""

    before: Figures
    case: Figures
    after: Figures

    def stock(self, figure: str) -> float:
        """The mean of both stock legs."""
        return (self.before[figure] + self.after[figure]) / 2

    def ratio(self, figure: str) -> float:
        """Case over stock."""
        return self.case[figure] / self.stock(figure)


def alternate(
    stock: Callable[[], Figures],
    cases: Mapping[Key, Callable[[], Figures]],
    count: int,
    *,
    between: int = 1,
) -> dict[Key, list[Round]]:
    """``count`` rounds of every case, with ``between`` legs of cases between two of stock vLLM.

    One is the best protection from drift; more save legs where each is costly to start.
    """
    rounds: dict[Key, list[Round]] = {key: [] for key in cases}
    keys = list(cases) * count
    before = stock()
    for start in range(0, len(keys), between):
        found = [(key, cases[key]()) for key in keys[start : start + between]]
        after = stock()
        for key, figures in found:
            rounds[key].append(Round(before, figures, after))
        before = after
    return rounds


def summary(rounds: Sequence[Round]) -> dict[str, float | int]:
    """Flat: of each figure ``f`` the medians ``f`` (case) and ``f_stock``, and the median, 20th and
    80th percentile of the rounds' ratios as ``f_ratio``, ``f_ratio_p20`` and ``f_ratio_p80``.
    """
    line: dict[str, float | int] = {"rounds": len(rounds)}
    for figure in rounds[0].case:
        ratios = [one.ratio(figure) for one in rounds]
        line[figure] = round(statistics.median(one.case[figure] for one in rounds), 4)
        line[f"{figure}_stock"] = round(statistics.median(r.stock(figure) for r in rounds), 4)
        line[f"{figure}_ratio"] = round(statistics.median(ratios), 4)
        for share in (20, 80):
            line[f"{figure}_ratio_p{share}"] = round(float(np.percentile(ratios, share)), 4)
    return line
