"""LM-Steer in float64, one row and one steer at a time."""

from dataclasses import dataclass

import torch

from vllm_steer.kernels.lm_steer.operands import (
    Constant,
    Dense,
    IntArray,
    LowRank,
    SteeredRows,
    SteerWeights,
)


@dataclass(frozen=True, eq=False)
class HostRows:
    """The pairs on the host, with scales ``[P]`` float32 on the device."""

    rows: IntArray
    scales: torch.Tensor
    groups: tuple[tuple[int, int, int], ...]


def prepare(steered: SteeredRows, weights: SteerWeights, device: torch.device) -> HostRows:
    """The pairs; the reference reads them on the host."""
    return HostRows(steered.rows, torch.tensor(steered.scales, device=device), steered.groups)


def warm_up(weights: SteerWeights, dtype: torch.dtype) -> None:
    """Nothing to compile."""


def steer_rows(x: torch.Tensor, weights: SteerWeights, steered: HostRows) -> torch.Tensor:
    """``x[b]`` plus the change of every pair ``(b, slot)``, see ``operands`` for the equations.

    Computed in float64 whatever the dtypes, rounded once to ``x.dtype``; rows without a pair are
    copied. ``x [T, width]``.
    """
    out = x.clone()
    totals = {row: x[row].double() for row in steered.rows.tolist()}
    for slot, start, end in steered.groups:
        for pair in range(start, end):
            row, scale = int(steered.rows[pair]), float(steered.scales[pair])
            if scale == 0:
                continue
            totals[row] = totals[row] + _change(x[row].double(), weights, slot, scale)
    for row, total in totals.items():
        out[row] = total.to(x.dtype)
    return out


def _change(x: torch.Tensor, weights: SteerWeights, slot: int, scale: float) -> torch.Tensor:
    match weights.slots[slot]:
        case LowRank(start, fixed, end, epsilon):
            inner = weights.shrink[start:end].double() @ x
            inner[: fixed - start] *= scale
            inner[fixed - start :] *= epsilon
            return inner @ weights.expand[start:end].double()
        case Dense(free, fixed, epsilon):
            change = scale * (weights.dense[free].double() @ x)
            if fixed is not None:
                change = change + epsilon * (weights.dense[fixed].double() @ x)
            return change
        case Constant(free, fixed, epsilon):
            change = scale * weights.vectors[free].double()
            if fixed is not None:
                change = change + epsilon * weights.vectors[fixed].double()
            return change
