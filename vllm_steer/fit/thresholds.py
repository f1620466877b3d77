"""Thresholds that tell two sets of prompts apart by a score, and how well they do.

With ``tp`` and ``fp`` the positive and the negative prompts on which a condition holds, and ``P``
and ``N`` all of each:

    precision = tp / (tp + fp)    recall = tp / P    F1 = 2 tp / (tp + fp + P)

    balanced F1 = 2 r / (r + f + 1)  with  r = tp / P,  f = fp / N

The balanced F1 is the F1 of as many positive as negative prompts. A condition that always holds has
2/3, however many prompts there are of each.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vllm_steer.steers.condition import SIDES, Side

Array = NDArray[np.float64]
ALWAYS: Final = 2 / 3
"""The balanced F1 of a condition that always holds."""


@dataclass(frozen=True)
class Figures:
    """How many of some prompts a condition holds on."""

    true_positives: int
    false_positives: int
    positives: int
    negatives: int

    @property
    def precision(self) -> float:
        """The share of positive prompts among those on which it holds; 0 if it never does."""
        return self.true_positives / max(self.true_positives + self.false_positives, 1)

    @property
    def recall(self) -> float:
        """The share of the positive prompts on which it holds."""
        return self.true_positives / self.positives

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall."""
        held = self.true_positives + self.false_positives
        return 2 * self.true_positives / (held + self.positives)

    @property
    def balanced_f1(self) -> float:
        """The F1 of as many positive as negative prompts."""
        rate = self.false_positives / self.negatives
        return 2 * self.recall / (self.recall + rate + 1)

    @property
    def data(self) -> dict[str, Any]:
        """The figures as plain data."""
        return {
            "positive_prompts": self.positives,
            "negative_prompts": self.negatives,
            "precision": self.precision,
            "recall": self.recall,
            "f1": self.f1,
            "balanced_f1": self.balanced_f1,
        }


@dataclass(frozen=True)
class Scores:
    """One score per prompt, for each side of a threshold, and whether the prompt is positive.

    Of several tokens, ``above`` has the largest score and ``below`` the smallest.
    """

    above: Array
    below: Array
    is_positive: NDArray[np.bool_]

    def of(self, side: Side) -> Array:
        """The scores that decide."""
        return self.above if side == "above" else self.below


@dataclass(frozen=True)
class Threshold:
    """A threshold, the side on which the condition holds, and its figures.

    ``margin`` is the gap between the two scores that it lies between, as a share of the range of
    all scores.
    """

    value: float
    side: Side
    margin: float
    train: Figures
    valid: Figures

    @property
    def rank(self) -> tuple[float, float, float]:
        """What makes a threshold better than another, the most important first."""
        return self.valid.balanced_f1, self.train.balanced_f1, self.margin


def best_threshold(train: Scores, valid: Scores) -> Threshold | None:
    """The threshold and side of the best balanced F1 on ``valid``.

    Candidates lie midway between neighbouring scores. Ties are decided by the balanced F1 on
    ``train``, then by the wider margin, then for side ``above`` and the lower threshold. None if
    all scores are equal.
    """
    best: Threshold | None = None
    for side in SIDES:
        candidate = _best_of_side(train, valid, side)
        if candidate is not None and (best is None or candidate.rank > best.rank):
            best = candidate
    return best


def _best_of_side(train: Scores, valid: Scores, side: Side) -> Threshold | None:
    scores = np.unique(np.concatenate([train.of(side), valid.of(side)]))
    if len(scores) < 2:
        return None
    gaps = np.diff(scores)
    candidates = scores[:-1] + gaps / 2
    margins = gaps / (scores[-1] - scores[0])
    counts = [_counts(part, side, candidates) for part in (train, valid)]
    ranks = [_balanced(*part) for part in counts]
    best = np.lexsort((candidates, -margins, -ranks[0], -ranks[1]))[0]
    figures = [
        Figures(int(true[best]), int(false[best]), positives, negatives)
        for true, false, positives, negatives in counts
    ]
    return Threshold(float(candidates[best]), side, float(margins[best]), *figures)


def _counts(
    scores: Scores, side: Side, thresholds: Array
) -> tuple[NDArray[np.int64], NDArray[np.int64], int, int]:
    """``tp`` and ``fp`` of each threshold, and the number of positive and negative prompts."""
    held = []
    for is_positive in (True, False):
        values = np.sort(scores.of(side)[scores.is_positive == is_positive])
        if side == "above":
            held.append(len(values) - np.searchsorted(values, thresholds, side="right"))
        else:
            held.append(np.searchsorted(values, thresholds, side="left"))
    positives = int(scores.is_positive.sum())
    return held[0], held[1], positives, len(scores.is_positive) - positives


def _balanced(
    true: NDArray[np.int64], false: NDArray[np.int64], positives: int, negatives: int
) -> Array:
    recall: Array = true / positives
    result: Array = 2 * recall / (recall + false / negatives + 1)
    return result
