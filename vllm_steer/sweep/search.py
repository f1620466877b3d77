"""Searches over strengths: the points to measure and the one to select."""

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
    """A measurement at a strength; ``ratio`` is perplexity / unsteered perplexity."""

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
    """Measure every candidate at every nonzero strength."""
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
    """Measure the largest strength within the budget for each candidate, by bisection.

    The far end is measured first and is the result if it is within the budget. Otherwise ``rounds``
    bisections follow between the largest strength known to be within the budget (at first the near
    end, unmeasured) and the smallest one known to exceed it. That takes at most ``rounds + 1``
    points; the error is at most ``|far - near| / 2^rounds`` if perplexity increases with strength.
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
    """Whether a point is within the budget; never for a perplexity that is not finite."""
    return math.isfinite(point.ratio) and point.ratio <= budget


def choose(
    points: Sequence[Point],
    unsteered: float,
    *,
    budget: float,
    direction: Direction,
    texts: int,
) -> Point:
    """The point within the budget whose effect differs most from ``unsteered`` in ``direction``.

    Equal effects are decided by the lower perplexity. The difference must exceed two standard
    errors of the difference of two shares, ``2 sqrt((e(1-e) + e0(1-e0)) / texts)``, with ``e`` and
    ``e0`` the effects with and without steer over ``texts`` texts each.

    Raises ``SteerError`` with the closest point if there is none.
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
