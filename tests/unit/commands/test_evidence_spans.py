"""The span search, compared with an exhaustive search."""

import itertools
import random
from collections.abc import Sequence

import pytest

from vllm_steer.inspection import best_spans


def by_brute_force(values: Sequence[float], spans: int, longest: int) -> float:
    """The best total over all sets of at most ``spans`` disjoint spans."""
    every = [
        (a, b) for a in range(len(values)) for b in range(a + 1, min(a + longest, len(values)) + 1)
    ]
    best = 0.0
    for count in range(1, spans + 1):
        for subset in itertools.combinations(every, count):
            if all(x[1] <= y[0] for x, y in itertools.pairwise(subset)):
                best = max(best, sum(sum(values[a:b]) for a, b in subset))
    return best


@pytest.mark.parametrize("seed", range(25))
def test_total_is_the_best_of_all_choices(seed: int) -> None:
    rng = random.Random(seed)
    # Integers, so that equal totals come up and no rounding hides a difference.
    values = [float(rng.randint(-6, 6)) for _ in range(rng.randint(1, 9))]
    spans, longest = rng.randint(1, 3), rng.randint(1, 4)
    spans_found = best_spans(values, spans=spans, longest=longest)
    assert sum(span.total for span in spans_found) == by_brute_force(values, spans, longest)
    assert len(spans_found) <= spans
    assert all(span.end <= after.begin for span, after in itertools.pairwise(spans_found))
    for begin, end, total in spans_found:
        assert 0 < end - begin <= longest
        assert total == sum(values[begin:end]) > 0


def test_spans_are_where_the_evidence_is() -> None:
    values = [-1.0, 2.0, 3.0, -9.0, -9.0, 4.0, -1.0, 4.0, -2.0]
    assert best_spans(values, spans=4, longest=10) == [(1, 3, 5.0), (5, 6, 4.0), (7, 8, 4.0)]
    assert best_spans(values, spans=2, longest=10) == [(1, 3, 5.0), (5, 8, 7.0)]
    assert best_spans(values, spans=1, longest=2) == [(1, 3, 5.0)]


def test_a_run_is_not_split_if_spans_are_left() -> None:
    # 0.1 + 0.2 + 0.3 in two parts is larger than as a whole, by rounding.
    assert [span[:2] for span in best_spans([0.1, 0.2, 0.3], spans=4, longest=10)] == [(0, 3)]


def test_a_run_longer_than_a_span_gets_two_adjacent_spans() -> None:
    first, second = best_spans([1.0] * 5, spans=2, longest=3)
    assert (first.begin, first.end, second.end) == (0, second.begin, 5)


@pytest.mark.parametrize("values", [[], [-1.0, -2.0], [0.0, 0.0]], ids=["none", "against", "zero"])
def test_there_is_no_span_without_evidence(values: list[float]) -> None:
    assert best_spans(values, spans=4, longest=10) == []


def test_no_spans_are_searched_if_none_are_requested() -> None:
    assert best_spans([1.0, 2.0], spans=0, longest=10) == []
