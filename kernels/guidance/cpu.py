"""Activation guidance on a CPU: the changes of all layers are computed once per step, in numpy.

A decode step on a CPU is dominated by the number of operations, not by arithmetic: tokens without a
dose are skipped, and each layer is one addition. A larger step, or one with a rotation, uses
``torch_gather``.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_steer.kernels.guidance.operands import (
    PLACEHOLDER_STRIDE,
    ActiveRequests,
    Directions,
    FloatArray,
    Gates,
    IntArray,
    TokenRules,
)
from vllm_steer.kernels.guidance.torch_gather import (
    map_tokens,
    read_conditions_,
    steer_tokens_,
    warm_up,
    warm_up_conditions,
)

__all__ = [
    "StepChanges",
    "map_tokens",
    "read_conditions_",
    "steer_tokens_",
    "step_changes",
    "warm_up",
    "warm_up_conditions",
]

_MOST = 2**20  # numbers that a step may add in all layers together: 4 MiB


@dataclass(frozen=True, eq=False)
class StepChanges:
    """The additions of a step: ``by_layer [L, S, width]`` float32 for S ``tokens`` or a slice."""

    tokens: IntArray | slice
    by_layer: FloatArray

    @classmethod
    def of(cls, tokens: IntArray, by_layer: FloatArray) -> "StepChanges":
        """The changes of tokens in ascending order."""
        if len(tokens) and tokens[-1] - tokens[0] + 1 == len(tokens):
            return cls(slice(int(tokens[0]), int(tokens[-1]) + 1), by_layer)
        return cls(tokens, by_layer)

    def __bool__(self) -> bool:
        """True if any token is changed."""
        return bool(self.by_layer.shape[1])

    def add_(self, hidden: torch.Tensor, layer: int) -> None:
        """Add the layer's change to ``hidden [T, width]``; sums in float32, rounded once."""
        change = self.by_layer[layer]
        if hidden.dtype == torch.float32:
            hidden.numpy()[self.tokens] += change  # torch would wake its threads for a row
        else:
            hidden[self.tokens] += torch.from_numpy(change)


def step_changes(
    rules: TokenRules,
    query_start_loc: torch.Tensor,
    positions: torch.Tensor,
    directions: Directions,
    gates: Gates | None = None,
) -> StepChanges | None:
    """The changes of a step's tokens, by the equations of ``TokenRules``.

    None if the step has to use ``map_tokens``; both ways give bit-identical results.
    """
    active, counts = rules.active_requests, np.diff(query_start_loc.numpy())
    if (counts == 1).all():  # decoding
        tokens, columns = active.rows, None
    else:
        column_of = np.repeat(active.column_of, counts)
        tokens = np.flatnonzero(column_of >= 0)
        columns = column_of[tokens]
    vectors = directions.vectors.numpy()
    if len(vectors) * len(tokens) * vectors.shape[2] > _MOST:
        return None
    which, strengths = _doses(active, columns, positions.numpy()[tokens])
    if gates is not None and active.gate is not None:
        gate = active.gate if columns is None else active.gate[:, columns]
        step0 = active.step0_position if columns is None else active.step0_position[:, columns]
        if ((gate > 0) & (strengths != 0) & (positions.numpy()[tokens] <= step0)).any():
            return None  # the verdict of this step's prompts is not known yet
        is_open = gates.verdicts.numpy().sum(1) >= gates.needed.numpy()
        strengths = strengths * is_open[gate]
    by_layer = (active.layers if columns is None else active.layers[:, :, columns]) * strengths
    readings = directions.readings
    if (
        readings is not None
        and (((readings.gains.numpy()[:, 0] != 1)[which] * strengths) != 0).any()
    ):
        return None
    touched = strengths.any(0)
    if not touched.all():
        tokens, which, by_layer = tokens[touched], which[:, touched], by_layer[:, :, touched]
    if (
        directions.is_rotation is not None
        and (directions.is_rotation.numpy()[which] * by_layer).any()
    ):
        return None
    change = vectors.take(which[0], axis=1)
    change *= by_layer[:, 0, :, None]
    for k in range(1, len(which)):
        change += vectors.take(which[k], axis=1) * by_layer[:, k, :, None]
    return StepChanges.of(tokens, change)


def _doses(
    active: ActiveRequests, columns: IntArray | None, positions: IntArray
) -> tuple[IntArray, FloatArray]:
    """Direction and strength ``[K, S]`` of tokens at ``positions``, of requests in ``columns``.

    ``columns=None``: every active request has exactly one token (decode).
    """

    def of(rule: Any) -> Any:
        return rule if columns is None else rule[..., columns]

    acts = ((positions >= of(active.begin)) & (positions < of(active.end))).any(0)
    if active.text_only is not None and active.placeholder_bounds is not None:
        rows = active.rows if columns is None else active.rows[columns]
        keys = rows * PLACEHOLDER_STRIDE + positions
        is_placeholder = np.searchsorted(active.placeholder_bounds, keys, side="right") & 1
        acts &= (of(active.text_only) & is_placeholder) == 0
    # Elsewhere the step stays 0: far from its steps the strength would overflow.
    step = np.where(acts, positions - of(active.step0_position), 0)
    strength = of(active.strength) * (1 - of(active.slope) * step.astype(np.float32))
    offset, pool = of(active.pool_offset), active.strength_pool
    index = offset + step
    dynamic = np.where((index >= 0) & (index < len(pool)), pool.take(index, mode="clip"), 0)
    strength = np.where(offset < 0, strength, dynamic)
    direction = of(active.direction_start) + of(active.direction_stride) * step
    return direction * acts, np.where(acts, strength, 0)
