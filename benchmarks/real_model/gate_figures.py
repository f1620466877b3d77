"""What the tokens of requests behind a condition say: precision, recall, F1, and exact equality."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.real_model.experiment import jackknife

TokenIds = tuple[int, ...]
Line = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """One request behind a condition: whether the condition should hold, whether it did as served
    (None if the tokens do not tell), whether it does in Hugging Face, and whether the tokens are
    those of the unsteered and of the always steered request.
    """

    is_positive: bool
    steered: bool | None
    expected: bool
    as_unsteered: bool
    as_always: bool


def outcome(
    is_positive: bool, expected: bool, unsteered: TokenIds, always: TokenIds, gated: TokenIds
) -> Outcome:
    """What the three greedy answers to one prompt say."""
    as_unsteered, as_always = gated == unsteered, gated == always
    steered = None if as_unsteered == as_always else as_always
    return Outcome(is_positive, steered, expected, as_unsteered, as_always)


def precision(rows: Sequence[Outcome]) -> float:
    """The share that should be steered among those that were; NaN if none was."""
    steered = [row.is_positive for row in rows if row.steered]
    return sum(steered) / len(steered) if steered else float("nan")


def recall(rows: Sequence[Outcome]) -> float:
    """The share that was steered among those that should be; NaN if none should be."""
    caught = [row.steered for row in rows if row.is_positive and row.steered is not None]
    return sum(caught) / len(caught) if caught else float("nan")


def f1(rows: Sequence[Outcome]) -> float:
    """The harmonic mean of precision and recall: ``2 tp / (2 tp + fp + fn)``."""
    known = [row for row in rows if row.steered is not None]
    right = sum(2 for row in known if row.is_positive and row.steered)
    wrong = sum(1 for row in known if row.is_positive != row.steered)
    return right / (right + wrong) if right + wrong else float("nan")


FIGURES: Final[Mapping[str, Callable[[Sequence[Outcome]], float]]] = {
    "precision": precision,
    "recall": recall,
    "f1": f1,
}


def figures(rows: Sequence[Outcome]) -> Line:
    """The figures of one condition with their errors, and counts of requests."""
    line: Line = {}
    for name, statistic in FIGURES.items():
        value, error = jackknife(rows, statistic)
        line |= {name: round(value, 4), f"{name}_error": round(error, 4)}
    same = [(row.as_unsteered, row.as_always) for row in rows]
    decided = [row for row in rows if row.steered is not None]
    return line | {
        "requests": len(rows),
        "as_unsteered": same.count((True, False)),
        "as_always": same.count((False, True)),
        "as_both": same.count((True, True)),
        "as_neither": same.count((False, False)),
        "unexpected": sum(row.steered is not row.expected for row in decided),
    }
