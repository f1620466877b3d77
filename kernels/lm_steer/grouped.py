"""The LM-Steer operation in plain torch: one pair of matrix products per steer in the batch."""

import torch

from vllm_steer.kernels.lm_steer.operands import SteeredRows, SteerTables


def steer_rows(x: torch.Tensor, tables: SteerTables, steered: SteeredRows) -> torch.Tensor:
    """``x[b] + sum_s epsilon_s * (a_s * (x[b] shrink_s^T)) expand_s`` for each pair ``(b, s)``.

    Rows are grouped by steer, so each steer's weights are read once. Products run in the tables'
    dtype, sums over steers in float32, in ascending order of slot. No host synchronisation: group
    bounds are known on the host. Returns a new tensor; rows without a pair are copied unchanged.
    """
    total = x.index_select(0, steered.touched).float()
    for slot, start, end in steered.groups:
        group = slice(start, end)
        change = _change(
            x.index_select(0, steered.rows[group]), tables, slot, steered.strengths[group]
        )
        total.index_add_(0, steered.places[group], change.float(), alpha=tables.epsilons[slot])
    return x.index_copy(0, steered.touched, total.to(x.dtype))


def _change(
    x: torch.Tensor, tables: SteerTables, slot: int, strengths: torch.Tensor
) -> torch.Tensor:
    """``(a * (x shrink^T)) expand`` of one slot; ``x [n, width]``, ``strengths [n]``."""
    rows = slice(tables.bounds[slot], tables.bounds[slot + 1])
    expand = tables.expand[rows]
    if tables.multiplies[slot]:
        inner = (x.to(expand.dtype) @ tables.shrink[rows].T).float()
    else:
        inner = strengths.new_ones(x.shape[0], expand.shape[0])
    inner[:, : tables.free_ranks[slot]] *= strengths[:, None]
    return inner.to(expand.dtype) @ expand
