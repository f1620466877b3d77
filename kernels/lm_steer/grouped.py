"""The LM-Steer operation in plain torch: one or two matrix products per steer in the batch."""

import torch
from torch.nn.functional import linear

from vllm_steer.kernels.lm_steer.operands import (
    Constant,
    Dense,
    LowRank,
    SteeredRows,
    SteerTables,
)


def steer_rows(x: torch.Tensor, tables: SteerTables, steered: SteeredRows) -> torch.Tensor:
    """``x[b]`` plus the change of every pair ``(b, slot)``, see ``operands`` for the equations.

    Rows are grouped by slot, so each steer's weights are read once. Products run in the tables'
    dtype, sums in float32, in ascending order of slot. No host synchronisation: group bounds are
    known on the host. Returns a new tensor; rows without a pair are copied unchanged.
    """
    total = x.index_select(0, steered.touched).float()
    for slot, start, end in steered.groups:
        group = slice(start, end)
        rows = x.index_select(0, steered.rows[group])
        change = _change(rows, tables, slot, steered.strengths[group, None])
        total.index_add_(0, steered.places[group], change)
    return x.index_copy(0, steered.touched, total.to(x.dtype))


def _change(
    x: torch.Tensor, tables: SteerTables, slot: int, strengths: torch.Tensor
) -> torch.Tensor:
    """One slot's change ``[n, width]`` float32; ``strengths [n, 1]``.

    Epsilon comes in before the last product, so that float16 does not overflow in between.
    """
    match tables.slots[slot]:
        case LowRank(start, end, free, epsilon):
            inner = linear(x.to(tables.shrink.dtype), tables.shrink[start:end]).float()
            inner[:, :free] *= strengths
            inner *= epsilon
            return (inner.to(tables.expand.dtype) @ tables.expand[start:end]).float()
        case Dense(free, fixed, epsilon):
            x = x.to(tables.dense.dtype)
            change = strengths * linear(x, tables.dense[free]).float()
            if fixed is not None:
                change += linear(x, tables.dense[fixed]).float()
            return epsilon * change
        case Constant(free, fixed, epsilon):
            change = strengths * tables.vectors[free].float()
            if fixed is not None:
                change += tables.vectors[fixed].float()
            return epsilon * change
