"""The KL over the likeliest tokens, from the few that can be among them: for the CPU.

A full sort of a vocabulary is most of the cost there. This looks at a row's first tokens only, and
says which rows they decide.
"""

import torch


def divergence_by_selection(
    base: torch.Tensor,
    probe: torch.Tensor,
    base_of: torch.Tensor,
    top_p: float | torch.Tensor,
    num_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """KL and size of ``Q`` of probes ``[D, V]`` and their rows of ``base [R, V]``, each ``[D]``,
    and whether they are decided.

    ``top_p`` is a number or ``[D, 1]``, ``num_tokens`` how many are looked at. A row is not decided
    where a distribution is so broad that they do not cover ``top_p``, where logits are equal at the
    border, and where a row is no distribution.
    """
    base_first = _first(base, num_tokens)
    base_tokens = base_first[2][base_of]
    base_inside, base_decided = _inside(base_first[0][base_of], base_first[1][base_of], top_p)
    first, cumulative, tokens = _first(probe, num_tokens)
    inside, decided = _inside(first, cumulative, top_p)
    chosen = torch.zeros(probe.shape, dtype=torch.bool)
    chosen.scatter_(-1, base_tokens, base_inside)
    inside &= ~chosen.gather(-1, tokens)
    union = torch.cat([base_inside, inside], dim=-1)
    of_union = torch.cat([base_tokens, tokens], dim=-1)
    log_p0 = base[base_of[:, None], of_union].masked_fill(~union, -torch.inf).log_softmax(-1)
    log_p1 = probe.gather(-1, of_union).masked_fill(~union, -torch.inf).log_softmax(-1)
    p0 = log_p0.exp()
    divergence = torch.where(p0 == 0, 0.0, p0 * (log_p0 - log_p1)).sum(-1)
    return divergence, union.sum(-1), decided & base_decided


def _first(logits: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The likeliest tokens' logits, their probabilities added up, the tokens, each ``[N, k]``."""
    first, tokens = logits.topk(size, dim=-1)
    total = logits.logsumexp(-1, keepdim=True)
    return first, (first - total).exp().cumsum(-1), tokens


def _inside(
    first: torch.Tensor, cumulative: torch.Tensor, top_p: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of the first tokens are the likeliest up to and with the one that crosses ``top_p``,
    and which rows that decides: it has crossed before the last of them, and the next is less.
    """
    before = torch.nn.functional.pad(cumulative[:, :-1], (1, 0))
    inside = before <= top_p
    count = inside.sum(-1, keepdim=True)
    crossed = (count > 0) & (count < first.shape[1])
    last = (count - 1).clamp(min=0)
    after = count.clamp(max=first.shape[1] - 1)
    decided = crossed & (first.gather(-1, last) > first.gather(-1, after))
    return inside, decided[:, 0]
