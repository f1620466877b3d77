"""Perplexity-normalised effect size (PNES): how far a steer moves text for what it costs.

With ``e(g)`` and ``p(g)`` effect and perplexity at strength ``g``, and ``0`` the strength that is
closest to zero:

    y(g) = (e(g) - e(0)) / (p(g) / p(0))
    ln(p(g) / p(0)) ~ b g^2                        least squares where p(g) < 2000
    y(g) ~ f(g) = (tanh(a g) + c) / exp(b g^2)     least squares over a and c, b as above
    PNES = max f - min f                           over 200 strengths from the lowest to the highest

Source: von Ruette et al., ICML 2024 (arXiv 2402.14433), as the authors' evaluation
script does it.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from vllm_steer.errors import SteerError, cause
from vllm_steer.optional import require_package

Array = npt.NDArray[np.float64]

_HIGHEST: Final = 2000.0  # of the perplexities that b is fitted to
_POINTS: Final = 200
_EVALUATIONS: Final = 20000
_NO_SLOPE: Final = 1e-6


@dataclass(frozen=True)
class Pnes:
    """``pnes`` and the curve it was read from.

    ``a``, ``b``, ``c`` give the curve, ``r2`` says how much of ``y``'s variance it explains (NaN
    where ``y`` has none), ``x_min`` and ``x_max`` are the strengths of its lowest and its highest
    point. ``flat`` says that the fit stayed at ``a = 0`` where it began: the curve is a bump that
    knows no direction. ``y`` belongs to ``strengths``.
    """

    pnes: float
    r2: float
    a: float
    b: float
    c: float
    x_min: float
    x_max: float
    baseline: float
    flat: bool
    strengths: tuple[float, ...]
    y: tuple[float, ...]

    def curve(self, strengths: Sequence[float]) -> list[float]:
        """``f`` at each strength."""
        return [float(f) for f in _curve(np.asarray(strengths, float), self.a, self.b, self.c)]


def perplexity_normalised_effect(
    strengths: Sequence[float], effects: Sequence[float], perplexities: Sequence[float]
) -> Pnes:
    """Fit the curve to one point per strength; points whose effect or perplexity is NaN are left.

    The fit begins at ``a = c = 0`` as the authors' does, and so ends where theirs does: ``a`` stays
    0 if ``y`` is even about zero, and rarely a start elsewhere would find a better curve.

    Raises ``SteerError`` for fewer than three points, no perplexity under 2000 but the baseline's,
    points that no curve can be fitted to, and a missing scipy.
    """
    x, effect, perplexity = _points(strengths, effects, perplexities)
    zero = int(np.abs(x).argmin())
    ratio = perplexity / perplexity[zero]
    y = (effect - effect[zero]) / ratio
    b = _cost(x[perplexity < _HIGHEST], ratio[perplexity < _HIGHEST])
    a, c = _fit(x, y, b)
    grid = np.linspace(x.min(), x.max(), _POINTS)
    curve = _curve(grid, a, b, c)
    return Pnes(
        pnes=float(curve.max() - curve.min()),
        r2=_explained(y, _curve(x, a, b, c)),
        a=a,
        b=b,
        c=c,
        x_min=float(grid[curve.argmin()]),
        x_max=float(grid[curve.argmax()]),
        baseline=float(x[zero]),
        flat=abs(a) * float(np.abs(x).max()) < _NO_SLOPE,
        strengths=tuple(x.tolist()),
        y=tuple(y.tolist()),
    )


def _points(*columns: Sequence[float]) -> tuple[Array, Array, Array]:
    """Strengths, effects and perplexities of the points that have all three."""
    rows = np.array(list(zip(*columns, strict=True)), float).reshape(-1, 3)
    rows = rows[np.isfinite(rows).all(1)]
    if len(set(rows[:, 0])) < 3:
        raise SteerError(
            f"PNES needs an effect and a perplexity at three strengths or more; there are "
            f"{len(set(rows[:, 0]))}"
        )
    if (rows[:, 2] <= 0).any():
        raise SteerError("PNES needs perplexities above 0")
    return rows[:, 0], rows[:, 1], rows[:, 2]


def _cost(x: Array, ratio: Array) -> float:
    """``b``: the least squares of a line through the origin over ``x^2``, in closed form."""
    square = x**2
    if not (square > 0).any():
        raise SteerError(
            f"PNES needs a strength other than 0 whose perplexity is below {_HIGHEST:g}; there is "
            "none; take smaller strengths"
        )
    return float((square * np.log(ratio)).sum() / (square**2).sum())


def _fit(x: Array, y: Array, b: float) -> tuple[float, float]:
    """``a`` and ``c`` by least squares from the authors' start."""
    optimize = require_package("scipy.optimize")

    def curve(x: Array, a: float, c: float) -> Array:
        return _curve(x, a, b, c)

    with warnings.catch_warnings():
        # A flat spot has no covariance; only the parameters are wanted.
        warnings.simplefilter("ignore", optimize.OptimizeWarning)
        try:
            a, c = optimize.curve_fit(curve, x, y, p0=(0.0, 0.0), maxfev=_EVALUATIONS)[0]
        except (RuntimeError, ValueError) as error:  # no convergence; values that are not finite
            raise SteerError(f"PNES: no curve can be fitted ({cause(error)})") from error
    if not np.isfinite(curve(x, a, c)).all():
        raise SteerError(
            f"PNES: no curve can be fitted: exp({-b:.3g} g^2) overflows at these strengths"
        )
    return float(a), float(c)


def _curve(x: Array, a: float, b: float, c: float) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        curve: Array = (np.tanh(a * x) + c) * np.exp(-b * x**2)
    return curve


def _explained(y: Array, curve: Array) -> float:
    total = float(((y - y.mean()) ** 2).sum())
    return 1 - float(((y - curve) ** 2).sum()) / total if total else math.nan
