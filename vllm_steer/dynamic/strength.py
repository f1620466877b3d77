"""The dynamic strength of Dynamic Activation Composition at one generation step.

``p0`` is the model's unsteered next-token distribution, ``p1`` that of a probe, which was steered
at the maximum strength in every step so far:

    Q        = top(p0) | top(p1); top(p) are the most likely tokens up to and including the one
               at which the cumulative probability exceeds top_p
    P0, P1   = p0, p1 renormalised over Q
    KL       = sum_{v in Q} P0(v) (ln P0(v) - ln P1(v))      "plain"
               the same / |Q|                                "authors"
    strength = min(max(KL, 0), maximum)

The authors' code divides by ``|Q|``: a mean instead of a sum. For broad distributions ``Q`` is
large and this strength is near 0. The authors compute in bfloat16; this code uses float32.

Source: Scalena et al., "Multi-property Steering of Large Language Models with Dynamic Activation
Composition", BlackboxNLP 2024 (arXiv 2406.17563), and the authors' code.
"""

from typing import Any

import torch

from vllm_steer.doses import KLS, Kl
from vllm_steer.errors import SteerError
from vllm_steer.kernels.dispatch import divergence_backend
from vllm_steer.kernels.divergence import DivergenceBackend
from vllm_steer.steers.checks import check_choice


def dynamic_strength(
    base_logits: torch.Tensor,
    probe_logits: torch.Tensor,
    *,
    top_p: float | torch.Tensor,
    maximum: float | torch.Tensor = 2.0,
    kl: Kl | torch.Tensor = "plain",
    base_of: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Strength and KL ``[...]`` of each row of a probe's logits ``[..., V]``.

    ``base_logits`` are the unsteered model's, ``[..., V]`` as well; or ``[R, V]`` for probes
    ``[D, V]`` with ``base_of [D]`` int64, the base row of each probe. ``top_p``, ``maximum`` and
    ``kl`` are one value for all rows or tensors that broadcast to ``[...]``; a ``kl`` tensor is
    bool, true for the authors' division.

    Results are float32, or float64 for float64 logits. The KL is returned before clipping, so
    rounding may leave it slightly below 0. If several steers are composed, each has its own probe
    and its own ``Q``. A token with logit ``-inf`` is never in ``top(p)``. If only the probe
    excludes a token of ``Q``, the KL is infinite and the strength is the maximum. A row with a NaN,
    or with no token at all, gives NaN; rows are independent. Ties go to the lower token id. There
    is no host synchronization.

    Raises ``SteerError`` for a number ``top_p`` outside (0, 1], a number ``maximum`` that is not
    positive, an unknown ``kl``, a ``kl`` tensor that is not bool, and logits of inconsistent
    shapes.

    >>> import torch
    >>> base, probe = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([2.0, 1.0, 0.0])
    >>> strength, kl = dynamic_strength(base, probe, top_p=1.0)
    >>> round(strength.item(), 4)
    1.1504
    """
    _check(top_p, maximum, kl)
    _check_shapes(base_logits, probe_logits, base_of)
    leading, vocab_size = probe_logits.shape[:-1], probe_logits.shape[-1]
    base, probe = base_logits.reshape(-1, vocab_size), probe_logits.reshape(-1, vocab_size)
    probe_of = torch.arange(len(probe), device=probe.device)
    if base_of is None:
        base_of = probe_of
    strength, divergence = strength_of_rows(
        torch.cat([base, probe]),
        base_of,
        probe_of + len(base),
        top_p=_flat(top_p, leading),
        maximum=_flat(maximum, leading),
        kl=_flat(kl, leading),
    )
    return strength.reshape(leading), divergence.reshape(leading)


def strength_of_rows(
    logits: torch.Tensor,
    base_of: torch.Tensor,
    probe_of: torch.Tensor,
    *,
    top_p: float | torch.Tensor,
    maximum: float | torch.Tensor,
    kl: Kl | torch.Tensor,
    backend: DivergenceBackend | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Strength and KL ``[D]`` of doses whose base and probe are these rows of ``logits [N, V]``.

    Each of these is a row of some dose. ``backend`` computes the KL; None takes the device's own.
    Unchecked, otherwise as ``dynamic_strength``.
    """
    backend = divergence_backend("auto", logits.device) if backend is None else backend
    divergence, size = backend.divergence(logits, base_of, probe_of, top_p)
    if isinstance(kl, torch.Tensor):
        divergence = divergence / torch.where(kl, size, 1)
    elif kl == "authors":
        divergence = divergence / size
    limit = maximum.to(divergence.dtype) if isinstance(maximum, torch.Tensor) else maximum
    return divergence.clamp(min=0.0).clamp(max=limit), divergence


def _flat(value: Any, leading: torch.Size) -> Any:
    """A number as it is, a tensor with one value per row."""
    return value.expand(leading).reshape(-1) if isinstance(value, torch.Tensor) else value


def _check(
    top_p: float | torch.Tensor, maximum: float | torch.Tensor, kl: str | torch.Tensor
) -> None:
    if not isinstance(kl, torch.Tensor):
        check_choice("kl", kl, KLS)
    elif kl.dtype != torch.bool:
        raise SteerError(
            f"kl is a tensor of {kl.dtype}; expected bool (true: divide by |Q| as the authors do)"
        )
    if not isinstance(top_p, torch.Tensor) and not 0 < top_p <= 1:
        raise SteerError(f"top_p is {top_p}; it must be above 0 and at most 1")
    if not isinstance(maximum, torch.Tensor) and not maximum > 0:
        raise SteerError(f"maximum is {maximum}; it must be above 0")


def _check_shapes(base: torch.Tensor, probe: torch.Tensor, base_of: torch.Tensor | None) -> None:
    if base_of is None:
        if base.shape != probe.shape:
            raise SteerError(
                f"unsteered logits are {list(base.shape)}, the probe's {list(probe.shape)}; they "
                "must be equal"
            )
    elif base.ndim != 2 or base_of.ndim != 1 or probe.shape != (len(base_of), base.shape[1]):
        raise SteerError(
            f"unsteered logits are {list(base.shape)}, the probes' {list(probe.shape)}, base_of "
            f"{list(base_of.shape)}; they must be [R, V], [D, V] and [D]"
        )
