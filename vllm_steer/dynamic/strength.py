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
from vllm_steer.dynamic.selection import divergence_by_selection
from vllm_steer.errors import SteerError
from vllm_steer.steers.checks import check_choice

_SELECTIONS = (64, 1024)  # likeliest tokens to look at, before a quarter of them and then all


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
    ``[D, V]`` with ``base_of [D]`` int64, the base row of each probe, which is sorted once however
    many probes it has. ``top_p``, ``maximum`` and ``kl`` are one value for all rows or tensors that
    broadcast to ``[...]``; a ``kl`` tensor is bool, true where the authors' division is wanted.

    Float32, or float64 where the logits are; the KL is the one before the clip, so that rounding
    may leave it just below 0. Where several steers are composed, each has a probe of its own and
    its own ``Q``. A token whose logit is ``-inf`` is not among the likeliest of its side, whatever
    ``top_p``; where the probe alone rules a token of ``Q`` out, the KL is infinite and the strength
    the maximum. A row with a NaN or without any token gives NaN, and no row touches another. Ties
    go to the lower token. Nothing here waits for the device, and no shape depends on the values: it
    can be captured in a graph. It needs several times the logits' memory while it runs.

    Raises ``SteerError`` for ``top_p`` outside (0, 1] and a maximum that is not above 0, where they
    are numbers; for an unknown ``kl`` and a ``kl`` tensor that is not bool; and for logits whose
    shapes do not belong together.
    """
    _check(top_p, maximum, kl)
    _check_shapes(base_logits, probe_logits, base_of)
    leading, vocab_size = probe_logits.shape[:-1], probe_logits.shape[-1]
    base, probe = base_logits.reshape(-1, vocab_size), probe_logits.reshape(-1, vocab_size)
    if base_of is None:
        base_of = torch.arange(base.shape[0], device=base.device)
    p = top_p.expand(leading).reshape(-1, 1) if isinstance(top_p, torch.Tensor) else top_p
    of_rows = _divergence_on_cpu if base.device.type == "cpu" else _divergence_by_sort
    divergence, size = of_rows(base, probe, base_of, p)
    divergence = divergence.reshape(leading) / _divisor(kl, size.reshape(leading))
    limit = maximum.to(divergence.dtype) if isinstance(maximum, torch.Tensor) else maximum
    return divergence.clamp(min=0.0).clamp(max=limit), divergence


def _divergence_on_cpu(
    base: torch.Tensor, probe: torch.Tensor, base_of: torch.Tensor, top_p: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as by sort, which takes only those rows that no selection decides."""
    base, probe = _widened(base), _widened(probe)
    divergence = torch.empty(probe.shape[0], dtype=probe.dtype)
    size = torch.empty(probe.shape[0], dtype=torch.int64)
    rest = torch.arange(probe.shape[0])
    vocab_size = probe.shape[1]
    for num_tokens in sorted({n for n in (*_SELECTIONS, vocab_size // 4) if 64 <= n < vocab_size}):
        found, count, decided = divergence_by_selection(base, probe, base_of, top_p, num_tokens)
        divergence[rest[decided]], size[rest[decided]] = found[decided], count[decided]
        rest = rest[~decided]
        if not rest.numel():
            return divergence, size
        base, probe = base[base_of[~decided]], probe[~decided]
        base_of = torch.arange(rest.numel())
        top_p = top_p[~decided] if isinstance(top_p, torch.Tensor) else top_p
    divergence[rest], size[rest] = _divergence_by_sort(base, probe, base_of, top_p)
    return divergence, size


def _divergence_by_sort(
    base: torch.Tensor, probe: torch.Tensor, base_of: torch.Tensor, top_p: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL and size of ``Q``, each ``[D]``, with nothing read back from the device."""
    num_base = base.shape[0]
    rank, before = _ranked(torch.cat([base, probe]))
    base = base[base_of]
    union = _top(base, rank[base_of], before[base_of], top_p)
    union |= _top(probe, rank[num_base:], before[num_base:], top_p)
    return _divergence(base, probe, union), union.sum(-1)


def _ranked(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's rank ``[N, V]``, 0 for the likeliest, and the probability before each rank."""
    likeliest, order = logits.sort(dim=-1, descending=True, stable=True)
    cumulative = _widened(likeliest).softmax(-1).cumsum(-1)
    before = torch.nn.functional.pad(cumulative[:, :-1], (1, 0))
    ranks = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)
    rank = torch.empty_like(order, dtype=torch.int32)
    return rank.scatter_(-1, order, ranks.expand_as(order)), before


def _top(
    logits: torch.Tensor, rank: torch.Tensor, before: torch.Tensor, top_p: float | torch.Tensor
) -> torch.Tensor:
    """Mask ``[D, V]`` of the likeliest tokens up to and with the one that crosses ``top_p``."""
    size = (before <= top_p).sum(-1, keepdim=True)
    return (rank < size) & (logits != -torch.inf)


def _divergence(base: torch.Tensor, probe: torch.Tensor, union: torch.Tensor) -> torch.Tensor:
    log_p0 = _widened(base).masked_fill(~union, -torch.inf).log_softmax(-1)
    log_p1 = _widened(probe).masked_fill(~union, -torch.inf).log_softmax(-1)
    p0 = log_p0.exp()
    # Tokens without probability add nothing, also where both logarithms are infinite.
    return torch.where(p0 == 0, 0.0, p0 * (log_p0 - log_p1)).sum(-1)


def _divisor(kl: Kl | torch.Tensor, union_size: torch.Tensor) -> torch.Tensor | int:
    if isinstance(kl, torch.Tensor):
        return torch.where(kl, union_size, 1)
    return union_size if kl == "authors" else 1


def _widened(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _check(
    top_p: float | torch.Tensor, maximum: float | torch.Tensor, kl: str | torch.Tensor
) -> None:
    if not isinstance(kl, torch.Tensor):
        check_choice("kl", kl, KLS)
    elif kl.dtype != torch.bool:
        raise SteerError(f"kl is a tensor of {kl.dtype}; it must be bool: true divides as authors")
    if not isinstance(top_p, torch.Tensor) and not 0 < top_p <= 1:
        raise SteerError(f"top_p is {top_p}; it must be above 0 and at most 1")
    if not isinstance(maximum, torch.Tensor) and not maximum > 0:
        raise SteerError(f"maximum is {maximum}; it must be above 0")


def _check_shapes(base: torch.Tensor, probe: torch.Tensor, base_of: torch.Tensor | None) -> None:
    if base_of is None:
        if base.shape != probe.shape:
            raise SteerError(
                f"unsteered logits are {list(base.shape)}, the probe's {list(probe.shape)}; they "
                "must be alike"
            )
    elif base.ndim != 2 or base_of.ndim != 1 or probe.shape != (len(base_of), base.shape[1]):
        raise SteerError(
            f"unsteered logits are {list(base.shape)}, the probes' {list(probe.shape)}, base_of "
            f"{list(base_of.shape)}; they must be [R, V], [D, V] and [D]"
        )
