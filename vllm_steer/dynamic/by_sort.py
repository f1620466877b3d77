"""The KL over the likeliest tokens for rows on a device: nothing is read back, no shape depends on
the values, so it can be captured in a graph. It needs several times the logits' memory.
"""

import torch


def divergence(
    logits: torch.Tensor,
    base_of: torch.Tensor,
    probe_of: torch.Tensor,
    top_p: float | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL and size of ``Q`` of D doses, each ``[D]``.

    ``base_of`` and ``probe_of [D]`` are their rows of ``logits [N, V]``, each of which is sorted
    once; ``top_p`` is a number or ``[D]``.
    """
    p: float | torch.Tensor = torch.inf  # at 1 every token, however the sums are rounded
    if isinstance(top_p, torch.Tensor):
        p = top_p.masked_fill(top_p >= 1, torch.inf)[:, None]
    elif top_p < 1:
        p = top_p
    rank, before = _ranked(logits)
    base, probe = logits[base_of], logits[probe_of]
    union = _top(base, rank[base_of], before[base_of], p)
    union |= _top(probe, rank[probe_of], before[probe_of], p)
    log_p0 = base.masked_fill(~union, -torch.inf).log_softmax(-1)
    log_p1 = probe.masked_fill(~union, -torch.inf).log_softmax(-1)
    p0 = log_p0.exp()
    # Tokens without probability add nothing, also where both logarithms are infinite.
    return torch.where(p0 == 0, 0.0, p0 * (log_p0 - log_p1)).sum(-1), union.sum(-1)


def _ranked(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's rank ``[N, V]``, 0 for the likeliest, and the probability before each rank."""
    likeliest, order = logits.sort(dim=-1, descending=True, stable=True)
    cumulative = likeliest.softmax(-1).cumsum(-1)
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
