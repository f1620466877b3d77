"""The LM-Steer operation written out: one row and one steer at a time."""

import torch

from vllm_steer.kernels.lm_steer.operands import (
    Constant,
    Dense,
    LowRank,
    SteeredRows,
    SteerTables,
)


def steer_rows(x: torch.Tensor, tables: SteerTables, steered: SteeredRows) -> torch.Tensor:
    """``x[b]`` plus the change of every pair ``(b, slot)``, see ``operands`` for the equations.

    Computed in float64 whatever the dtypes, rounded once to ``x.dtype``; rows without a pair are
    copied. ``x [T, width]``.
    """
    out = x.clone()
    totals = {int(row): x[row].double() for row in steered.touched}
    for slot, start, end in steered.groups:
        for pair in range(start, end):
            row, strength = int(steered.rows[pair]), float(steered.strengths[pair])
            totals[row] = totals[row] + _change(x[row].double(), tables, slot, strength)
    for row, total in totals.items():
        out[row] = total.to(x.dtype)
    return out


def _change(x: torch.Tensor, tables: SteerTables, slot: int, strength: float) -> torch.Tensor:
    match tables.slots[slot]:
        case LowRank(start, end, free, epsilon):
            inner = tables.shrink[start:end].double() @ x
            inner[:free] *= strength
            return epsilon * (inner @ tables.expand[start:end].double())
        case Dense(free, fixed, epsilon):
            change = strength * (tables.dense[free].double() @ x)
            if fixed is not None:
                change = change + tables.dense[fixed].double() @ x
            return epsilon * change
        case Constant(free, fixed, epsilon):
            change = strength * tables.vectors[free].double()
            if fixed is not None:
                change = change + tables.vectors[fixed].double()
            return epsilon * change
