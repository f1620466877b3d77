"""Activation guidance in the host's memory: what a step adds is worked out once for all layers.

There a step of decoding is many small operations, not many numbers: the tokens that take nothing
are left out, and each layer is one addition. A step too large for that, or with a direction that
turns, goes through ``gather``.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_steer.kernels.guidance.gather import map_tokens, steer_tokens_, warm_up
from vllm_steer.kernels.guidance.operands import (
    Directions,
    FloatArray,
    IntArray,
    Rules,
    Takers,
)

__all__ = ["HostChanges", "changes_of", "map_tokens", "steer_tokens_", "warm_up"]

_MOST = 2**20  # numbers that a step may add in all layers together: 4 MiB


@dataclass(frozen=True, eq=False)
class HostChanges:
    """What a step adds: ``by_layer [L, S, width]`` float32 to S ``tokens``, or a stretch."""

    tokens: IntArray | slice
    by_layer: FloatArray

    @classmethod
    def of(cls, tokens: IntArray, by_layer: FloatArray) -> "HostChanges":
        """Changes of tokens that ascend."""
        if len(tokens) and tokens[-1] - tokens[0] + 1 == len(tokens):
            return cls(slice(int(tokens[0]), int(tokens[-1]) + 1), by_layer)
        return cls(tokens, by_layer)

    def __bool__(self) -> bool:
        """Whether any token is changed."""
        return bool(self.by_layer.shape[1])

    def add_(self, hidden: torch.Tensor, layer: int) -> None:
        """Add the layer's change to ``hidden [T, width]``; sums in float32, rounded once."""
        change = self.by_layer[layer]
        if hidden.dtype == torch.float32:
            hidden.numpy()[self.tokens] += change  # torch would wake its threads for a row
        else:
            hidden[self.tokens] += torch.from_numpy(change)


def changes_of(
    rules: Rules,
    query_start_loc: torch.Tensor,
    positions: torch.Tensor,
    directions: Directions,
) -> HostChanges | None:
    """What the step's tokens take, by the equations of ``Rules`` for one dose or more.

    None for a step to be mapped. Either way a token's result has the same bits.
    """
    takers, counts = rules.takers, np.diff(query_start_loc.numpy())
    if (counts == 1).all():  # decoding
        tokens, columns = takers.rows, None
    else:
        column_of = np.repeat(takers.column_of, counts)
        tokens = np.flatnonzero(column_of >= 0)
        columns = column_of[tokens]
    vectors = directions.vectors.numpy()
    if len(vectors) * len(tokens) * vectors.shape[2] > _MOST:
        return None
    which, strengths = _doses(takers, columns, positions.numpy()[tokens])
    by_layer = (takers.layers if columns is None else takers.layers[:, :, columns]) * strengths
    touched = strengths.any(0)
    if not touched.all():
        tokens, which, by_layer = tokens[touched], which[:, touched], by_layer[:, :, touched]
    if directions.turns is not None and (directions.turns.numpy()[which] * by_layer).any():
        return None
    change = vectors.take(which[0], axis=1)
    change *= by_layer[:, 0, :, None]
    for k in range(1, len(which)):
        change += vectors.take(which[k], axis=1) * by_layer[:, k, :, None]
    return HostChanges.of(tokens, change)


def _doses(
    takers: Takers, columns: IntArray | None, positions: IntArray
) -> tuple[IntArray, FloatArray]:
    """Direction and strength ``[K, S]`` of tokens at these positions of requests in ``columns``;
    None: of all takers, one token of each.
    """

    def of(rule: Any) -> Any:
        return rule if columns is None else rule[:, columns]

    acts = (positions >= of(takers.first)) & (positions < of(takers.last))
    step = np.where(acts, positions - of(takers.origin), 0)  # far from its steps all overflows
    strength = of(takers.strength) * (1 - of(takers.slope) * step.astype(np.float32))
    table, history = of(takers.table), takers.history
    place = table + step
    own = np.where((place >= 0) & (place < len(history)), history.take(place, mode="clip"), 0)
    strength = np.where(table < 0, strength, own)
    return (of(takers.start) + of(takers.stride) * step) * acts, np.where(acts, strength, 0)
