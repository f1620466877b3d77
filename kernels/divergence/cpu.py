"""The divergence in numpy on a CPU, without sorting the vocabulary.

``top(p)`` nearly always has few tokens, so the 64 most likely are examined first. For other rows
the tokens are counted in bins by their distance from the most likely token; only the bin in which
the cumulative probability crosses ``top_p`` is sorted. Sums and the KL are in float64.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

_FIRST = 64  # most likely tokens that are examined before a row is binned
_BINS = 1024
_SPAN = 20.0  # nats from the most likely token to the last bin, which holds all tokens further away


@dataclass(frozen=True, eq=False)
class _TopTokens:
    """The most likely tokens of N rows, each ``[N, k]`` in descending order, and the total weight.

    before  the probability of the tokens before each one
    total   ``[N]`` log-sum-exp of the row; finite only for a valid distribution
    """

    values: FloatArray
    tokens: IntArray
    before: FloatArray
    total: FloatArray


def divergence(
    logits: torch.Tensor,
    base_of: torch.Tensor,
    probe_of: torch.Tensor,
    top_p: float | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL and size of ``Q``, see ``DivergenceBackend``. Processes all rows of ``logits``."""
    if logits.dtype != torch.float64:
        logits = logits.float()
    logits = logits.detach()
    x, num_doses = logits.numpy(), len(base_of)
    if num_doses == 0:
        return logits.new_zeros(0), base_of
    rows = np.array([base_of.numpy(), probe_of.numpy()])
    p = np.empty((2, num_doses))
    p[:] = top_p.detach().double().numpy() if isinstance(top_p, torch.Tensor) else top_p
    p[p >= 1] = np.inf  # all tokens, regardless of rounding in the sums
    with np.errstate(all="ignore"):
        first = _first(logits)
        sides, tokens = _likeliest(x, first, rows.ravel(), p.ravel())
        union = np.zeros((num_doses, x.shape[1]), dtype=bool)
        union[sides % num_doses, tokens] = True
        doses, tokens = _indices(union)
        kl = _divergence(x, first.values[:, 0], rows, doses, tokens)
    size = np.bincount(doses, minlength=num_doses)
    return torch.from_numpy(kl.astype(x.dtype)), torch.from_numpy(size)


def _divergence(
    x: FloatArray, highest: FloatArray, rows: IntArray, doses: IntArray, tokens: IntArray
) -> FloatArray:
    """The KL ``[D]``, from the (dose, token of ``Q``) pairs: ``sum w0 (ln w0 - ln w1) / m0 - ln m0
    + ln m1``, with ``w`` the weights relative to the most likely token and ``m`` their sums.
    Exactly 0 for equal distributions and for a ``Q`` of one token; NaN if a side is not a
    distribution.
    """
    num_doses = rows.shape[1]
    row_of = rows[:, doses]
    logs = x[row_of, tokens].astype(np.float64) - highest[row_of]
    w0, w1 = np.exp(logs)
    # Tokens without probability add nothing, also where both logarithms are infinite.
    terms = np.where(w0 == 0, 0.0, w0 * (logs[0] - logs[1]))
    sums, m0, m1 = (np.bincount(doses, weights, num_doses) for weights in (terms, w0, w1))
    kl: FloatArray = sums / m0 - np.log(m0) + np.log(m1)
    return kl


def _first(logits: torch.Tensor) -> _TopTokens:
    values, tokens = (part.numpy() for part in logits.topk(min(_FIRST, logits.shape[1]), dim=-1))
    sums = np.exp(logits.numpy() - values[:, :1]).sum(-1, dtype=np.float64)
    total = values[:, 0] + np.log(sums)
    weights = np.exp(values - total[:, None])
    return _TopTokens(values, tokens, weights.cumsum(-1) - weights, total)


def _likeliest(
    x: FloatArray, first: _TopTokens, rows: IntArray, top_p: FloatArray
) -> tuple[IntArray, IntArray]:
    """Pairs (index in ``rows``, token): the most likely tokens of each row up to and including the
    one that crosses ``top_p``; none for a row that is not a distribution.
    """
    inside = first.before[rows] <= top_p[:, None]
    count = inside.sum(-1)
    # The first tokens are enough if the next one is less likely; ties go to the lower token id.
    next_one = np.minimum(count, inside.shape[1] - 1)
    decided = first.values[rows, count - 1] > first.values[rows, next_one]
    if decided.all():
        sides, nth = _indices(inside)
        return sides, first.tokens[rows[sides], nth]
    inside &= decided[:, None]
    sides, nth = _indices(inside)
    broad = np.flatnonzero(~decided & np.isfinite(first.total[rows]))
    more, tokens = _indices(_binned(x[rows[broad]], top_p[broad]))
    return (
        np.concatenate([sides, broad[more]]),
        np.concatenate([first.tokens[rows[sides], nth], tokens]),
    )


def _binned(x: FloatArray, top_p: FloatArray) -> BoolArray:
    """Mask ``[U, V]`` of the most likely tokens, for distributions of any breadth."""
    depth = x.max(-1, keepdims=True) - x
    weights = np.exp(-depth)
    bins = np.minimum(depth, _SPAN) * ((_BINS - 1) / _SPAN)
    bins = bins.astype(np.int32) + np.arange(len(x), dtype=np.int32)[:, None] * _BINS
    sums = np.bincount(bins.ravel(), weights.ravel(), len(x) * _BINS).reshape(-1, _BINS)
    before = np.cumsum(sums, axis=-1) - sums
    limit = top_p * sums.sum(-1)
    crossing = (before <= limit[:, None]).sum(-1) - 1
    crossing_bins = (crossing + np.arange(len(x)) * _BINS)[:, None]
    mask: BoolArray = bins < crossing_bins
    rows, tokens = _indices(bins == crossing_bins)
    order = np.lexsort((tokens, depth[rows, tokens], rows))
    rows, tokens = rows[order], tokens[order]
    inside = weights[rows, tokens].astype(np.float64)
    so_far = np.cumsum(inside) - inside
    start = so_far[np.searchsorted(rows, rows)]
    mask[rows, tokens] = before[rows, crossing[rows]] + so_far - start <= limit[rows]
    mask &= x != -np.inf
    return mask


def _indices(mask: BoolArray) -> tuple[IntArray, IntArray]:
    """Row and column indices of true elements; faster than ``numpy.nonzero`` in two dimensions."""
    flat = np.flatnonzero(mask)
    rows = flat // mask.shape[1]
    return rows, flat - rows * mask.shape[1]
