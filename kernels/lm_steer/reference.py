"""The LM-Steer operation written out: one row and one steer at a time."""

import torch

from vllm_steer.kernels.lm_steer.operands import SteeredRows, SteerTables


def steer_rows(x: torch.Tensor, tables: SteerTables, steered: SteeredRows) -> torch.Tensor:
    """``x[b] + sum_s epsilon_s * (a_s * (x[b] shrink_s^T)) expand_s`` for each pair ``(b, s)``.

    ``a_s`` holds the pair's strength for the slot's free ranks and 1 for the fixed ones. Computed
    in float64 whatever the dtypes, rounded once to ``x.dtype``; rows without a pair are copied.
    """
    wide = x.double()
    total = wide.clone()
    for slot, start, end in steered.groups:
        first, last = tables.bounds[slot], tables.bounds[slot + 1]
        expand = tables.expand[first:last].double()
        shrink = tables.shrink[first:last].double()
        for pair in range(start, end):
            row = int(steered.rows[pair])
            scale = torch.ones(last - first, dtype=torch.float64, device=x.device)
            scale[: tables.free_ranks[slot]] = steered.strengths[pair].double()
            inner = shrink @ wide[row] if tables.multiplies[slot] else torch.ones_like(scale)
            total[row] += tables.epsilons[slot] * ((scale * inner) @ expand)
    return torch.where(total == wide, x, total.to(x.dtype))
