"""The divergence in PyTorch, with a sort of the vocabulary: for devices without Triton kernels.

No host synchronization, and no shape depends on the values. It needs many times the memory of the
logits, so it processes a few doses at a time.
"""

import torch

_DOSES_AT_ONCE = 8


def divergence(
    logits: torch.Tensor,
    base_of: torch.Tensor,
    probe_of: torch.Tensor,
    top_p: float | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL and size of ``Q``, see ``DivergenceBackend``."""
    p: float | torch.Tensor = torch.inf  # at 1 all tokens, regardless of rounding in the sums
    if isinstance(top_p, torch.Tensor):
        p = top_p.masked_fill(top_p >= 1, torch.inf)
    elif top_p < 1:
        p = top_p
    results = [
        _of_some(
            _wide(logits[base_of[start : start + _DOSES_AT_ONCE]]),
            _wide(logits[probe_of[start : start + _DOSES_AT_ONCE]]),
            p[start : start + _DOSES_AT_ONCE, None] if isinstance(p, torch.Tensor) else p,
        )
        for start in range(0, max(1, base_of.shape[0]), _DOSES_AT_ONCE)
    ]
    if len(results) == 1:
        return results[0]
    kls, sizes = zip(*results, strict=True)
    return torch.cat(kls), torch.cat(sizes)


def _of_some(
    base: torch.Tensor, probe: torch.Tensor, top_p: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL and size of ``Q`` of d doses, from their base and probe rows ``[d, V]``."""
    union = _top(base, top_p) | _top(probe, top_p)
    log_p0 = base.masked_fill(~union, -torch.inf).log_softmax(-1)
    log_p1 = probe.masked_fill(~union, -torch.inf).log_softmax(-1)
    p0 = log_p0.exp()
    # Tokens without probability add nothing, also where both logarithms are infinite.
    return torch.where(p0 == 0, 0.0, p0 * (log_p0 - log_p1)).sum(-1), union.sum(-1)


def _top(logits: torch.Tensor, top_p: float | torch.Tensor) -> torch.Tensor:
    """Mask ``[d, V]`` of the most likely tokens, including the one that crosses ``top_p``."""
    likeliest, order = logits.sort(dim=-1, descending=True, stable=True)
    cumulative = likeliest.softmax(-1).cumsum(-1)
    before = torch.nn.functional.pad(cumulative[:, :-1], (1, 0))
    inside = torch.empty_like(order, dtype=torch.bool).scatter_(-1, order, before <= top_p)
    return inside & (logits != -torch.inf)


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
