"""Probes of one layer against their formulas, written out in numpy."""

from typing import Any

import numpy as np
import pytest

from vllm_steer import SteerError
from vllm_steer.fit.probes import (
    FIT,
    Probe,
    accuracy,
    fit_dim,
    fit_logistic,
    fit_pca,
    oriented,
)

WIDTH = 5


@pytest.fixture
def rows() -> tuple[Any, Any]:
    """Tokens of unequal lengths, three of four with label 1, not perfectly separable."""
    rng = np.random.default_rng(5)
    y = (np.arange(240) % 4 != 0).astype(int)
    x = rng.normal(size=(240, WIDTH)) * rng.lognormal(size=(240, 1)) + [3, 0, 0, 1, 0]
    x[:, 1] += 1.2 * (2 * y - 1)
    return x, y


def unit(w: Any) -> Any:
    return w / np.linalg.norm(w)


def test_dim_normalises_after_centring_and_counts_signed_tokens(rows: tuple[Any, Any]) -> None:
    x, y = rows
    mean = sum(x) / len(x)
    total = np.zeros(WIDTH)
    for row, label in zip(x, y, strict=True):
        total += (1 if label else -1) * (row - mean) / np.linalg.norm(row - mean)
    probe = fit_dim(x, y, 0)
    np.testing.assert_allclose(probe.direction, unit(total / len(x)), rtol=1e-12)
    difference = unit(x[y == 1].mean(0) - x[y == 0].mean(0))
    assert probe.direction @ difference < 0.999  # it is another direction


def test_dim_takes_the_mean_and_not_the_mean_of_blocks() -> None:
    x = np.zeros((1025, 1))
    x[1024] = 1.0
    of_blocks = np.mean([x[:1024].mean(), x[1024:].mean()])
    assert of_blocks == 0.5
    y = (np.arange(1025) % 2).astype(int)
    assert fit_dim(x, y, 0).center == pytest.approx(1 / 1025, rel=1e-12)


def test_a_logistic_probe_minimises_its_loss_and_keeps_its_length(rows: tuple[Any, Any]) -> None:
    x, y = rows
    unit_rows = np.array([unit(row) for row in x])
    signs = 2 * y - 1
    w = np.zeros(WIDTH)
    for _ in range(50):  # Newton's method
        p = 1 / (1 + np.exp(signs * (unit_rows @ w)))
        gradient = w - unit_rows.T @ (signs * p)
        hessian = np.eye(WIDTH) + unit_rows.T @ (unit_rows * (p * (1 - p))[:, None])
        w = w - np.linalg.solve(hessian, gradient)
    probe = fit_logistic(x, y, 0)
    np.testing.assert_allclose(probe.direction, w, rtol=0, atol=1e-2 * np.linalg.norm(w))
    assert abs(np.linalg.norm(probe.direction) - 1) > 0.1
    assert (probe.slope, probe.intercept, probe.center) == (1.0, 0.0, None)


def test_pca_is_the_first_component_of_differences_of_pairs(rows: tuple[Any, Any]) -> None:
    x, y = rows
    x = x[:-1]  # an odd row is left over
    rng = np.random.default_rng(7)
    order = rng.permutation(len(x))
    signs = rng.choice([-1.0, 1.0], size=len(x) // 2)
    pairs = [(order[i], order[i + 1]) for i in range(0, len(x) - 1, 2)]
    differences = np.array(
        [sign * (x[i] - x[j]) for (i, j), sign in zip(pairs, signs, strict=True)]
    )
    expected = np.linalg.eigh(np.cov(differences.T))[1][:, -1]
    direction = fit_pca(x, y[:-1], 7).direction
    assert abs(direction @ expected) == pytest.approx(1, abs=1e-12)


def test_pca_ignores_the_labels_and_signed_orients_it_to_label_1(rows: tuple[Any, Any]) -> None:
    x, y = rows
    x = x + 9 * np.outer(2 * y - 1, [0, 0, 0, 0, 1])
    probe, flipped = fit_pca(x, y, 0), fit_pca(x, 1 - y, 0)
    np.testing.assert_array_equal(probe.direction, flipped.direction)
    assert np.sign(probe.slope) == -np.sign(flipped.slope)
    for one, labels in ((probe, y), (flipped, 1 - y)):
        turned = oriented(one)
        projected = x @ turned.direction
        assert projected[labels == 1].mean() > projected[labels == 0].mean()
        assert turned.slope > 0
        np.testing.assert_array_equal(turned.predict(x), one.predict(x))


def test_the_slope_and_intercept_are_an_unpenalised_logistic_regression(
    rows: tuple[Any, Any],
) -> None:
    x, y = rows
    probe = fit_dim(x, y, 0)
    alpha = np.array([unit(row - x.mean(0)) for row in x]) @ probe.direction
    a = b = 0.0
    for _ in range(100):
        p = 1 / (1 + np.exp(-(a * alpha + b)))
        residual, weight = y - p, p * (1 - p)
        design = np.stack([alpha, np.ones_like(alpha)])
        step = np.linalg.solve(design * weight @ design.T, design @ residual)
        a, b = a + step[0], b + step[1]
    assert probe.slope == pytest.approx(a, rel=1e-2)
    assert probe.intercept == pytest.approx(b, rel=5e-2)


def test_accuracy_is_a_mean_over_messages_of_their_means_over_tokens() -> None:
    probe = Probe(np.array([1.0]), normalized=False)
    x = np.array([[2.0], [-1.0], [-1.0], [3.0], [1.0]])
    y = np.array([1, 1, 1, 1, 0])
    # Right are: 1 of 1; of the next three 1; of the last 0. The message without tokens is none.
    assert accuracy(probe, x, y, [1, 0, 3, 1]) == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert accuracy(probe, x[:0], y[:0], [0]) is None


@pytest.mark.parametrize("kind", ["dim", "logistic", "pca"])
def test_a_probe_is_the_same_in_blocks_and_when_repeated(kind: str, monkeypatch: Any) -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(50, WIDTH)), np.arange(50) % 2
    whole = FIT[kind](x, y, 3)  # type: ignore[index]
    monkeypatch.setattr("vllm_steer.fit.probes._BLOCK", 7)
    blocks = FIT[kind](x, y, 3)  # type: ignore[index]
    np.testing.assert_allclose(whole.direction, blocks.direction, rtol=1e-12)


def test_pca_of_too_few_tokens_is_refused() -> None:
    with pytest.raises(SteerError, match="pca needs at least 4 tokens; there are 3"):
        fit_pca(np.ones((3, 2)), np.array([0, 1, 0]), 0)


def test_separable_tokens_have_accuracy_one() -> None:
    x = np.array([[1.0, 0.2], [2.0, -0.1], [-1.0, 0.1], [-2.0, -0.3]] * 5)
    y = np.array([1, 1, 0, 0] * 5)
    assert accuracy(fit_dim(x, y, 0), x, y, [4] * 5) == 1.0
