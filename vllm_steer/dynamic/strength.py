"""The strength that Dynamic Activation Composition gives a delta at one generation step.

With ``p0`` the model's next-token distribution without a steer and ``p1`` that of a probe, steered
at the maximum strength at every step so far:

    Q        = top(p0) | top(p1), top(p) the likeliest tokens up to and with the one whose
               cumulative probability exceeds top_p
    P0, P1   = p0, p1 renormalised over Q
    KL       = sum_{v in Q} P0(v) (ln P0(v) - ln P1(v))      "plain"
               the same / |Q|                                "authors"
    strength = min(max(KL, 0), maximum)

The authors' code divides by ``|Q|``: it takes a mean where a sum is wanted. On a model whose
distributions are broad ``Q`` is large, and their strength is near 0. They compute in bfloat16,
which is coarser than here.

Source: Scalena et al., "Multi-property Steering of Large Language Models with Dynamic Activation
Composition", BlackboxNLP 2024 (arXiv 2406.17563), and the authors' code.
"""

import torch

from vllm_steer.doses import KLS, Kl
from vllm_steer.errors import SteerError
from vllm_steer.steers.checks import check_choice


def dynamic_strength(
    base_logits: torch.Tensor,
    probe_logits: torch.Tensor,
    *,
    top_p: float,
    maximum: float = 2.0,
    kl: Kl = "plain",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Strength and KL ``[...]`` of each row of logits ``[..., V]``, unsteered and of the probe.

    Float32, or float64 where the logits are; the KL is the one before the clip, so that rounding
    may leave it just below 0. Where several steers are composed, each has a probe of its own and
    its own ``Q``. Nothing here waits for the device, and no shape depends on the values: it can be
    captured in a graph.

    Raises ``SteerError`` for ``top_p`` outside (0, 1], a maximum that is not above 0, an unknown
    ``kl``, and logits of different shapes.
    """
    _check(base_logits, probe_logits, top_p, maximum, kl)
    base, probe = _widened(base_logits), _widened(probe_logits)
    union = _top(base, top_p) | _top(probe, top_p)
    log_p0 = base.masked_fill(~union, -torch.inf).log_softmax(-1)
    log_p1 = probe.masked_fill(~union, -torch.inf).log_softmax(-1)
    p0 = log_p0.exp()
    # Tokens without probability add nothing, also where both logarithms are infinite.
    divergence = torch.where(p0 > 0, p0 * (log_p0 - log_p1), 0.0).sum(-1)
    if kl == "authors":
        divergence = divergence / union.sum(-1)
    return divergence.clamp(0.0, maximum), divergence


def _top(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Mask ``[..., V]`` of the likeliest tokens up to and with the one that crosses ``top_p``."""
    probabilities, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = torch.nn.functional.pad(probabilities.cumsum(-1)[..., :-1], (1, 0))
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, before <= top_p)


def _widened(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _check(
    base_logits: torch.Tensor, probe_logits: torch.Tensor, top_p: float, maximum: float, kl: str
) -> None:
    check_choice("kl", kl, KLS)
    if not 0 < top_p <= 1:
        raise SteerError(f"top_p is {top_p}; it must be above 0 and at most 1")
    if not maximum > 0:
        raise SteerError(f"maximum is {maximum}; it must be above 0")
    if base_logits.shape != probe_logits.shape:
        raise SteerError(
            f"unsteered logits are {list(base_logits.shape)}, the probe's "
            f"{list(probe_logits.shape)}; they must be alike"
        )
