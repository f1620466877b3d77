"""PNES, compared with curves of known constants and a grid search."""

import math

import numpy as np
import pytest

from vllm_steer import SteerError
from vllm_steer.evaluation.pnes import perplexity_normalised_effect

STRENGTHS = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)


def perplexities(b: float, strengths: tuple[float, ...] = STRENGTHS) -> list[float]:
    return [20 * math.exp(b * g**2) for g in strengths]


def test_the_curve_that_made_the_points_is_found() -> None:
    a, b = 0.8, 0.05
    # y = tanh(a g) / exp(b g^2) and y = (e - 0.5) / exp(b g^2), so e = 0.5 + tanh(a g).
    result = perplexity_normalised_effect(
        STRENGTHS, [0.5 + math.tanh(a * g) for g in STRENGTHS], perplexities(b)
    )
    assert (result.a, result.b, result.c) == pytest.approx((a, b, 0), abs=1e-6)
    assert result.r2 == pytest.approx(1)
    grid = [-4 + 8 * index / 199 for index in range(200)]
    curve = [math.tanh(a * g) / math.exp(b * g**2) for g in grid]
    assert result.pnes == pytest.approx(max(curve) - min(curve), abs=1e-6)
    assert result.x_max == pytest.approx(grid[curve.index(max(curve))])
    assert result.x_min == pytest.approx(grid[curve.index(min(curve))])
    assert result.curve(grid) == pytest.approx(curve, abs=1e-6)
    assert not result.flat


def test_noisy_points_get_the_least_squares_of_a_fine_grid() -> None:
    effects = [0.12, 0.2, 0.41, 0.5, 0.66, 0.7, 0.93]
    ppl = [55.0, 31.0, 22.0, 20.0, 24.0, 28.0, 61.0]
    result = perplexity_normalised_effect(STRENGTHS, effects, ppl)
    g = np.array(STRENGTHS)
    ratio = np.array(ppl) / 20
    b = min(np.linspace(0, 0.2, 200001), key=lambda b: ((np.log(ratio) - b * g**2) ** 2).sum())
    y = (np.array(effects) - 0.5) / ratio

    def error(a: np.ndarray, c: np.ndarray) -> np.ndarray:
        curve = (np.tanh(a[..., None] * g) + c[..., None]) * np.exp(-b * g**2)
        return ((y - curve) ** 2).sum(-1)

    a, c = np.meshgrid(np.linspace(0, 1, 1001), np.linspace(-0.5, 0.5, 1001))
    errors = error(a, c)
    best = np.unravel_index(errors.argmin(), errors.shape)
    assert result.b == pytest.approx(b, abs=2e-6)
    assert (result.a, result.c) == pytest.approx((a[best], c[best]), abs=2e-3)
    total = ((y - y.mean()) ** 2).sum()
    assert result.r2 == pytest.approx(1 - errors.min() / total, abs=1e-4)


def test_the_baseline_is_the_strength_closest_to_zero() -> None:
    strengths = (-3.0, 0.5, 2.0, 4.0)
    result = perplexity_normalised_effect(strengths, [0.1, 0.4, 0.6, 0.9], [40, 10, 20, 80])
    assert result.baseline == 0.5
    assert result.y == pytest.approx([-0.3 / 4, 0, 0.2 / 2, 0.5 / 8])


def test_perplexities_from_two_thousand_on_do_not_shape_the_cost() -> None:
    ppl = perplexities(0.1)
    ppl[0], ppl[-1] = 2000.0, 1e7
    result = perplexity_normalised_effect(STRENGTHS, [0.5] * 7, ppl)
    assert result.b == pytest.approx(0.1)
    ppl[0] = 1999.0
    assert perplexity_normalised_effect(STRENGTHS, [0.5] * 7, ppl).b != pytest.approx(0.1)


def test_an_even_effect_stays_on_the_flat_spot_of_the_start() -> None:
    effects = [0.5 + 0.1 * abs(g) for g in STRENGTHS]
    result = perplexity_normalised_effect(STRENGTHS, effects, perplexities(0.05))
    assert result.flat
    assert result.a == pytest.approx(0, abs=1e-6)
    assert result.r2 < 0


def test_an_effect_that_never_changes_has_no_r2_and_no_size() -> None:
    result = perplexity_normalised_effect(STRENGTHS, [0.5] * 7, perplexities(0.05))
    assert math.isnan(result.r2)
    assert result.pnes == 0
    assert result.flat


def test_points_without_a_figure_are_left_out() -> None:
    effects = [0.1, 0.3, math.nan, 0.5, 0.6, 0.7, 0.9]
    ppl = perplexities(0.05)
    ppl[5] = math.nan
    result = perplexity_normalised_effect(STRENGTHS, effects, ppl)
    assert result.strengths == (-4, -2, 0, 1, 4)


@pytest.mark.parametrize(
    ("strengths", "ppl", "message"),
    [
        ((0.0, 1.0), [10, 20], "at 3 or more strengths; only 2 have both"),
        ((0.0, 1.0, 1.0), [10, 20, 20], "at 3 or more strengths; only 2 have both"),
        ((-1.0, 0.0, 1.0), [10, 0, 20], "PNES needs perplexities above 0"),
        (
            (-1.0, 0.0, 1.0),
            [3000, 20, 3000],
            "below 2000, and no strength has one; use smaller strengths",
        ),
        ((-100.0, -1.0, 0.0, 1.0), [3000, 5, 20, 5], r"exp\(1.39 g\^2\) overflows"),
    ],
)
def test_points_that_no_curve_can_be_fitted_to_are_an_error(
    strengths: tuple[float, ...], ppl: list[float], message: str
) -> None:
    with pytest.raises(SteerError, match=message):
        perplexity_normalised_effect(strengths, [0.1, 0.5, 0.6, 0.9][: len(strengths)], ppl)
