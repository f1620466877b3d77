"""The spans of a sequence with the largest sums.

    maximise  sum over spans of sum_{a <= t < b} x_t

over at most ``spans`` spans ``[a, b)`` of at most ``longest`` places that share none.

Source: Han et al., "Word Embeddings Are Steers for Language Models", ACL 2024 (arXiv 2305.12798),
section 5: 4 spans of at most 10 tokens.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

_NONE = 0  # no span ends here
_FEWER = -1  # another span gains nothing up to here
_ROUNDING = 1e-9


class ScoredSpan(NamedTuple):
    """Places ``begin`` to ``end``, the end excluded, and their sum."""

    begin: int
    end: int
    total: float


def best_spans(values: Sequence[float], *, spans: int = 4, longest: int = 10) -> list[ScoredSpan]:
    """The spans in their order; none has a sum of 0 or less, and two may touch.

    Exact, by dynamic programming in ``O(len(values) * spans * longest)``: with ``S`` the sums of
    the first ``t`` places, ``best[k][t]`` is the largest of ``best[k-1][t]``, ``best[k][t-1]`` and
    ``best[k-1][t-l] + S[t] - S[t-l]`` over the lengths ``l``. Of choices within 1e-9 of each other,
    which is rounding, one of the fewest spans is taken.
    """
    sums = [0.0, *accumulate(values)]
    best, taken = [0.0] * len(sums), []
    for _ in range(spans):
        best, lengths = _add_span(best, sums, longest)
        taken.append(lengths)
    return _backtrack(taken, sums)


def _add_span(
    fewer: Sequence[float], sums: Sequence[float], longest: int
) -> tuple[list[float], list[int]]:
    """The best totals with one span more, and the length of the span that ends at each place.

    In place of a length there may be ``_NONE`` or ``_FEWER``.
    """
    best, lengths = [0.0], [_FEWER]
    for t in range(1, len(sums)):
        total, length = fewer[t], _FEWER
        if best[-1] > total + _ROUNDING:
            total, length = best[-1], _NONE
        for tried in range(1, min(longest, t) + 1):
            reached = fewer[t - tried] + sums[t] - sums[t - tried]
            if reached > total + _ROUNDING:
                total, length = reached, tried
        best.append(total)
        lengths.append(length)
    return best, lengths


def _backtrack(taken: Sequence[Sequence[int]], sums: Sequence[float]) -> list[ScoredSpan]:
    found: list[ScoredSpan] = []
    place, left = len(sums) - 1, len(taken)
    while place > 0 and left > 0:
        length = taken[left - 1][place]
        if length == _FEWER:
            left -= 1
        elif length == _NONE:
            place -= 1
        else:
            begin = place - length
            found.append(ScoredSpan(begin, place, sums[place] - sums[begin]))
            place, left = begin, left - 1
    return found[::-1]
