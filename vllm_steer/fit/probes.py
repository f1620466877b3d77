"""Linear probes of one layer: classify whether a token belongs to a text with the concept.

With ``x`` ``[tokens, width]`` the activations, ``y`` in ``{0, 1}`` each token's label and
``s = 2y - 1``

    dim       x' = (x - m) / |x - m|, m = mean x;  w = u / |u|, u = mean s x'
    logistic  x' = x / |x|;                        w = argmin |w|^2 / 2 + sum log(1 + exp(-s x' w))
    pca       x' = x;                              w = first component of the differences of pairs

    p(y = 1 | x) = 1 / (1 + exp(-(a x' w + b)))

``dim`` normalises after centring, so it is not the difference of the two means: every token has one
vote, whatever its length, and the larger class the larger say. ``logistic`` has no intercept, its
``w`` is not of length 1, and a = 1, b = 0. ``pca`` never sees the labels: the rows are shuffled and
paired, the differences get random signs, and the sign of ``w`` is arbitrary. For ``dim`` and
``pca``, ``a`` and ``b`` are a logistic regression on ``x' w`` without a penalty.

Source: von Ruette et al., "A Language Model's Guide Through Latent Space", ICML 2024
(arXiv 2402.14433), section 3, as the authors' training script does it. Their mean of more than
1,024 rows gives a last, shorter block the weight of a whole one; here it is the mean.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from vllm_steer.errors import SteerError
from vllm_steer.fit.token_store import Rows
from vllm_steer.optional import require_package

ProbeKind = Literal["dim", "logistic", "pca"]
PROBES: tuple[ProbeKind, ...] = get_args(ProbeKind)
Array = NDArray[np.float64]
Labels = NDArray[np.integer[Any]]
_BLOCK = 2048


@dataclass(frozen=True)
class Probe:
    """``p(y = 1 | x) = 1 / (1 + exp(-(slope x' direction + intercept)))``, sums in float64."""

    direction: Array  # [width]
    slope: float = 1.0
    intercept: float = 0.0
    center: Array | None = None  # [width], subtracted first
    normalized: bool = True  # whether x' has length 1

    def project(self, x: Rows) -> Array:
        """``x' direction`` ``[tokens]``."""
        blocks = _prepared(x, self.center, self.normalized)
        return np.concatenate([block @ self.direction for block in blocks])

    def predict(self, x: Rows) -> NDArray[np.bool_]:
        """For each token, true if ``p > 1/2``."""
        return self.slope * self.project(x) + self.intercept > 0


def fit_dim(x: Rows, y: Labels, seed: int) -> Probe:
    """The difference in means of centred, normalised rows; nothing in it is random."""
    center = np.sum([block.sum(0) for block in _blocks(x)], axis=0) / len(x)
    total, start = np.zeros_like(center), 0
    for block in _prepared(x, center, True):
        total += (2 * y[start : start + len(block)] - 1) @ block
        start += len(block)
    norm = np.linalg.norm(total)
    return _with_slope(Probe(total / (norm or 1.0), center=center), x, y, tolerance=1e-3)


def fit_logistic(x: Rows, y: Labels, seed: int) -> Probe:
    """A logistic regression with the l2 penalty at C = 1, without an intercept."""
    regression = require_package("sklearn.linear_model").LogisticRegression(
        solver="liblinear", C=1.0, fit_intercept=False, max_iter=300, tol=1e-3, random_state=seed
    )
    rows = np.concatenate(list(_prepared(x, None, True))).astype(x.dtype, copy=False)
    return Probe(regression.fit(rows, y).coef_[0].astype(np.float64))


def fit_pca(x: Rows, y: Labels, seed: int) -> Probe:
    """The first principal component of the differences of randomly paired rows, signs random."""
    if len(x) < 4:
        raise SteerError(f"pca needs at least 4 tokens; there are {len(x)}")
    rng = np.random.default_rng(seed)  # the same pairs in each layer
    first, second = rng.permutation(len(x))[: len(x) // 2 * 2].reshape(-1, 2).T
    signs = rng.choice([-1.0, 1.0], size=(len(first), 1)).astype(x.dtype)
    pca = require_package("sklearn.decomposition").PCA(n_components=1, random_state=seed)
    direction = pca.fit((x[first] - x[second]) * signs).components_[0].astype(np.float64)
    return _with_slope(Probe(direction, normalized=False), x, y, tolerance=1e-2)


FIT: dict[ProbeKind, Callable[[Rows, Labels, int], Probe]] = {
    "dim": fit_dim,
    "logistic": fit_logistic,
    "pca": fit_pca,
}


def oriented(probe: Probe) -> Probe:
    """The probe with its direction towards label 1: turned where the slope is negative."""
    if probe.slope >= 0:
        return probe
    return replace(probe, direction=-probe.direction, slope=-probe.slope)


def accuracy(probe: Probe, x: Rows, y: Labels, lengths: Sequence[int]) -> float | None:
    """The share of right tokens of each message, its mean over messages; None without tokens.

    ``lengths`` are the tokens of each message, in the order of the rows; a message of none does not
    count.
    """
    ends = np.cumsum([length for length in lengths if length])
    if not len(ends):
        return None
    right = probe.predict(x) == (y == 1)
    return float(np.mean([part.mean() for part in np.split(right, ends[:-1])]))


def _with_slope(probe: Probe, x: Rows, y: Labels, tolerance: float) -> Probe:
    linear_model = require_package("sklearn.linear_model")
    # C is the inverse of the penalty: infinite is none.
    regression = linear_model.LogisticRegression(C=np.inf, max_iter=500, tol=tolerance)
    with warnings.catch_warnings():
        # Tokens that a threshold tells apart have no finite slope: wherever it stops is as good.
        warnings.simplefilter("ignore", require_package("sklearn.exceptions").ConvergenceWarning)
        regression.fit(probe.project(x)[:, None], y)
    slope, intercept = regression.coef_[0, 0], regression.intercept_[0]
    return replace(probe, slope=float(slope), intercept=float(intercept))


def _prepared(x: Rows, center: Array | None, normalized: bool) -> Iterator[Array]:
    """``x'``, a block of rows at a time."""
    for block in _blocks(x):
        rows = block if center is None else block - center
        if normalized:
            norms = np.linalg.norm(rows, axis=1, keepdims=True)
            rows = rows / np.maximum(norms, np.finfo(np.float64).tiny)
        yield rows


def _blocks(x: Rows) -> Iterator[Array]:
    for start in range(0, len(x), _BLOCK):
        yield np.asarray(x[start : start + _BLOCK], dtype=np.float64)
