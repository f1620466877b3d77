"""LM-Steer in PyTorch: one or two matrix products per steer in the batch."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import linear

from vllm_steer.kernels.lm_steer.operands import (
    Constant,
    Dense,
    LowRank,
    SteeredRows,
    SteerWeights,
)
from vllm_steer.kernels.upload import upload


@dataclass(frozen=True, eq=False)
class GroupedRows:
    """The P pairs on the device, and the U rows that they touch.

    rows     ``[P]`` int64, the row of each pair
    scales   ``[P]`` float32, epsilon times strength; may be written to
    touched  ``[U]`` int64, every row of ``rows`` once, ascending
    touched_index  ``[P]`` int64, the index of each pair's row in ``touched``
    groups   ``(slot, start, end)`` on the host: pairs ``start:end`` use ``slot``
    """

    rows: torch.Tensor
    scales: torch.Tensor
    touched: torch.Tensor
    touched_index: torch.Tensor
    groups: tuple[tuple[int, int, int], ...]


def prepare(steered: SteeredRows, weights: SteerWeights, device: torch.device) -> GroupedRows:
    """The pairs on the device, in one copy."""
    touched, touched_index = np.unique(steered.rows, return_inverse=True)
    on_device = upload([steered.rows, steered.scales, touched, touched_index], device)
    rows, scales, touched_rows, touched_indices = on_device
    return GroupedRows(rows, scales, touched_rows, touched_indices, steered.groups)


def warm_up(weights: SteerWeights, dtype: torch.dtype) -> None:
    """Nothing to compile."""


def steer_rows(x: torch.Tensor, weights: SteerWeights, steered: GroupedRows) -> torch.Tensor:
    """``x[b]`` plus the change of every pair ``(b, slot)``, see ``operands`` for the equations.

    Rows are grouped by slot, so each steer's weights are read once, and scaled before the products,
    so that float16 does not overflow in between. Products run in the weights' dtype, sums in
    float32, in ascending order of slot. No host synchronisation: group bounds are known on the
    host. Returns a new tensor; rows without a pair are copied unchanged.
    """
    rows, scales = x.index_select(0, steered.rows), steered.scales[:, None]
    masked = torch.where(scales != 0, rows, 0.0)  # 0 * inf would be NaN
    scaled = (masked * scales).to(weights.dtype)
    changes = torch.empty_like(scaled)
    for slot, start, end in steered.groups:
        pairs = slice(start, end)
        _write_change(changes[pairs], weights, slot, masked[pairs], scaled[pairs], scales[pairs])
    if steered.touched.shape == steered.rows.shape:  # one steer per row: no sums to take
        return x.index_copy(0, steered.rows, (rows + changes).to(x.dtype))
    total = x.index_select(0, steered.touched).float()
    total.index_add_(0, steered.touched_index, changes.float())
    return x.index_copy(0, steered.touched, total.to(x.dtype))


def _write_change(
    out: torch.Tensor,
    weights: SteerWeights,
    slot: int,
    rows: torch.Tensor,
    scaled: torch.Tensor,
    scales: torch.Tensor,
) -> None:
    """One slot's change of its ``n`` rows into ``out [n, width]``.

    ``rows`` are zero where ``scales [n, 1]`` are, ``scaled`` is rows x scales.
    """
    match weights.slots[slot]:
        case LowRank(start, fixed, end, epsilon):
            inner = linear(scaled, weights.shrink[start:fixed])
            if fixed < end:
                even = (rows * epsilon).to(weights.dtype)
                inner = torch.cat([inner, linear(even, weights.shrink[fixed:end])], dim=1)
            torch.mm(inner, weights.expand[start:end], out=out)
        case Dense(free, fixed, epsilon):
            torch.mm(scaled, weights.dense[free].T, out=out)
            if fixed is not None:
                out.addmm_((rows * epsilon).to(weights.dtype), weights.dense[fixed].T)
        case Constant(free, fixed, epsilon):
            torch.mul(scales, weights.vectors[free], out=out)
            if fixed is not None:
                out.addcmul_((scales != 0).to(out.dtype), weights.vectors[fixed], value=epsilon)
