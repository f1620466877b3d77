"""Searches for a strength: which points to measure, and which one to select."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from vllm_steer.errors import SteerError
from vllm_steer.sweep.candidates import CandidateLayers

Direction = Literal["up", "down"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)


@dataclass(frozen=True)
class Point:
    """What a steer does in some layers at a strength; ``ratio`` is perplexity / unsteered's."""

    candidate: CandidateLayers
    strength: float
    effect: float
    perplexity: float
    ratio: float

    @property
    def data(self) -> dict[str, Any]:
        """The point as plain data."""
        layers = self.candidate.layers
        return {
            "layers": None if layers is None else list(layers),
            "candidate": self.candidate.name,
            "strength": self.strength,
            "effect": self.effect,
            "perplexity": self.perplexity,
            "perplexity_ratio": self.ratio,
        }


Measure = Callable[[CandidateLayers, float], Point]


def grid(
    measure: Measure, candidates: Sequence[CandidateLayers], strengths: Sequence[float]
) -> Iterator[Point]:
    """Every candidate at every strength but 0."""
    for candidate in candidates:
        for strength in strengths:
            if strength != 0:
                yield measure(candidate, strength)


def bisection(
    measure: Measure,
    candidates: Sequence[CandidateLayers],
    ends: tuple[float, float],
    *,
    rounds: int,
    budget: float,
) -> Iterator[Point]:
    """For each candidate the largest strength within the budget, as it is closed in on.

    The far end first: if it is within the budget, that is all. Otherwise ``rounds`` halvings of
    what lies between the largest strength known within and the smallest known outside; the near end
    is taken to be within. So ``rounds + 1`` points at most, and a strength that is right to
    ``|far - near| / 2^rounds`` where perplexity rises with strength.
    """
    for candidate in candidates:
        inside, outside = ends
        point = measure(candidate, outside)
        yield point
        if within(point, budget):
            continue
        for _ in range(rounds):
            point = measure(candidate, (inside + outside) / 2)
            yield point
            if within(point, budget):
                inside = point.strength
            else:
                outside = point.strength


def within(point: Point, budget: float) -> bool:
    """Whether the texts are natural enough; a perplexity that is not finite never is."""
    return math.isfinite(point.ratio) and point.ratio <= budget


def choose(
    points: Sequence[Point],
    unsteered: float,
    *,
    budget: float,
    direction: Direction,
    texts: int,
) -> Point:
    """The point within the budget whose effect differs most from ``unsteered`` in a direction.

    Of equal effects the one of lower perplexity. A difference has to exceed two standard errors of
    the difference of two shares over ``texts`` texts, ``2 sqrt((e(1-e) + e0(1-e0)) / texts)``:
    chance alone makes one as large in few sweeps.

    Raises ``SteerError`` if there is no such point, saying what came nearest.
    """
    sign = 1.0 if direction == "up" else -1.0
    inside = [p for p in points if within(p, budget) and not math.isnan(p.effect)]
    if not inside:
        lowest = min((p.ratio for p in points if math.isfinite(p.ratio)), default=math.nan)
        raise SteerError(
            f"no strength is within the budget: the lowest perplexity ratio is {lowest:.3g} and "
            f"the budget is {budget:g}; try smaller strengths, or raise the budget"
        )
    best = max(inside, key=lambda p: (sign * p.effect, -p.ratio))
    gain = sign * (best.effect - unsteered)
    if gain <= noise(best.effect, unsteered, texts):
        raise SteerError(
            "no strength within the budget changes the effect significantly: the largest change "
            f"is from {unsteered:.3f} to {best.effect:.3f} (strength {best.strength:g}), within "
            f"two standard errors over {texts} texts; try larger strengths, other layers, the "
            "other direction or more texts"
        )
    return best


def noise(effect: float, unsteered: float, texts: int) -> float:
    """Two standard errors of the difference of two shares, each over ``texts`` texts."""
    variance = sum(max(0.0, share * (1 - share)) for share in (effect, unsteered))
    return 2 * math.sqrt(variance / texts)
