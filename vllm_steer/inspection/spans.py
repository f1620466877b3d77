"""The spans of a sequence with the largest sums.

    maximise  sum over spans of sum_{a <= t < b} x_t

over at most ``spans`` disjoint spans ``[a, b)`` of at most ``longest`` elements.

Source: Han et al., "Word Embeddings Are Steers for Language Models", ACL 2024 (arXiv 2305.12798),
section 5: 4 spans of at most 10 tokens.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

_NONE = 0  # no span ends here
_FEWER = -1  # the best total up to here uses fewer spans
_ROUNDING = 1e-9


class ScoredSpan(NamedTuple):
    """A span ``[begin, end)`` of a sequence and its sum."""

    begin: int
    end: int
    total: float


def best_spans(values: Sequence[float], *, spans: int = 4, longest: int = 10) -> list[ScoredSpan]:
    """The best disjoint spans, in order; each has a sum above 0, and two may be adjacent.

    Exact, by dynamic programming in ``O(len(values) * spans * longest)``: with ``S[t]`` the sum of
    the first ``t`` values, ``best[k][t]`` is the maximum of ``best[k-1][t]``, ``best[k][t-1]`` and
    ``best[k-1][t-l] + S[t] - S[t-l]`` over the lengths ``l``. Among solutions within 1e-9
    (rounding), one with the fewest spans is returned.
    """
    sums = [0.0, *accumulate(values)]
    best, choices = [0.0] * len(sums), []
    for _ in range(spans):
        best, lengths = _add_span(best, sums, longest)
        choices.append(lengths)
    return _backtrack(choices, sums)


def _add_span(
    fewer: Sequence[float], sums: Sequence[float], longest: int
) -> tuple[list[float], list[int]]:
    """The best totals with one more span, and the length of the span that ends at each position.

    ``_NONE`` or ``_FEWER`` may stand in place of a length.
    """
    best, lengths = [0.0], [_FEWER]
    for t in range(1, len(sums)):
        total, length = fewer[t], _FEWER
        if best[-1] > total + _ROUNDING:
            total, length = best[-1], _NONE
        for candidate in range(1, min(longest, t) + 1):
            candidate_total = fewer[t - candidate] + sums[t] - sums[t - candidate]
            if candidate_total > total + _ROUNDING:
                total, length = candidate_total, candidate
        best.append(total)
        lengths.append(length)
    return best, lengths


def _backtrack(choices: Sequence[Sequence[int]], sums: Sequence[float]) -> list[ScoredSpan]:
    spans: list[ScoredSpan] = []
    position, remaining = len(sums) - 1, len(choices)
    while position > 0 and remaining > 0:
        length = choices[remaining - 1][position]
        if length == _FEWER:
            remaining -= 1
        elif length == _NONE:
            position -= 1
        else:
            begin = position - length
            spans.append(ScoredSpan(begin, position, sums[position] - sums[begin]))
            position, remaining = begin, remaining - 1
    return spans[::-1]
