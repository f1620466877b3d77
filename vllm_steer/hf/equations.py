"""The equations of the kinds of steers inside the layers, and of conditions: one function each.

``x`` ``[..., width]`` is the tensor at a site, in the dtype of the sums, before any steer of this
site and layer. A change has ``x``'s shape and is what the steer adds at strength 1; a feature, a
coefficient and a similarity are ``[...]``. Vectors are ``[width]``. All are in ``x``'s dtype.
"""

import torch


def added(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``w``: of mode ``add``, and of ``rotate`` with the unit vector."""
    return w.expand_as(x)


def projected(x: torch.Tensor, u: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """``(clip(a, low, high) - a) u`` with ``a = x . u``: mode ``project``, ``u`` of length 1."""
    a = x @ u
    change: torch.Tensor = (a.clamp(low, high) - a)[..., None] * u
    return change


def relative(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """``|x| u``: mode ``relative``, ``u`` of length 1."""
    change: torch.Tensor = x.norm(dim=-1, keepdim=True) * u
    return change


def low_rank(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``B (A x + bias)`` with ``A [rank, width]``, ``B [width, rank]``, ``bias [rank]``."""
    inner = x @ a.T
    return (inner if bias is None else inner + bias) @ b.T


def feature(
    x: torch.Tensor, e: torch.Tensor, bias: torch.Tensor, threshold: torch.Tensor
) -> torch.Tensor:
    """``f = p if p > threshold else 0`` with ``p = e . x + bias``: an SAE's feature."""
    p = x @ e + bias
    return torch.where(p > threshold, p, 0.0)


def clamped(f: torch.Tensor, d: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """``(clip(f, low, high) - f) d``: mode ``clamp`` of an SAE's feature."""
    return (f.clamp(low, high) - f)[..., None] * d


def scaled(f: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """``f d``: mode ``scale`` of an SAE's feature."""
    return f[..., None] * d


def cosine(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``(x . w) / (|x| |w|)``, 0 for a zero vector."""
    product = x.norm(dim=-1) * w.norm(dim=-1)
    value: torch.Tensor = (x * w).sum(-1) / product.clamp_min(torch.finfo(x.dtype).tiny)
    return value


def dot(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``x . w/|w|``."""
    value: torch.Tensor = x @ (w / w.norm())
    return value


def cast(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``cos(x, tanh((x . w) w / (w . w)))``, the tanh of each element."""
    return cosine(x, torch.tanh((x @ w / (w @ w))[..., None] * w))


SIMILARITY = {"cosine": cosine, "dot": dot, "cast": cast}
"""The equations of conditions by name."""
