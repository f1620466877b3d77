"""Activation guidance on a CPU: the changes of all layers are computed once per step, in numpy.

A decode step on a CPU is dominated by the number of operations, not by arithmetic: tokens without a
dose are skipped, and each layer is one addition. Changes that depend on the token are computed in
the layer, for the tokens that have some, in numpy as well: torch would wake its threads for every
operation. A larger step, or one in another dtype, uses ``torch_gather``.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_steer.kernels.guidance import torch_gather
from vllm_steer.kernels.guidance.operands import (
    PLACEHOLDER_STRIDE,
    ActiveRequests,
    Directions,
    FloatArray,
    Gates,
    IntArray,
    Readings,
    TokenMap,
    TokenRules,
)
from vllm_steer.kernels.guidance.torch_gather import (
    map_tokens,
    read_conditions_,
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
_MOST_IN_LAYER = 2**17  # numbers of a layer that are computed without torch's threads


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
        if gate.any():
            strengths = strengths * _are_open(gates, gate)
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


def steer_tokens_(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    directions: Directions,
    layer: int,
    token_map: TokenMap,
    depth: int,
) -> None:
    """Change ``hidden [T, width]`` in place by the first ``depth`` doses of each token."""
    is_small = hidden.numel() <= _MOST_IN_LAYER and hidden.dtype == torch.float32
    if not is_small or (residual is not None and residual.dtype != torch.float32):
        torch_gather.steer_tokens_(hidden, residual, directions, layer, token_map, depth)
        return
    num_tokens = hidden.shape[0]
    strengths = token_map.strengths[layer, :depth, :num_tokens].numpy()
    if token_map.gate is not None and token_map.gates is not None:
        gate = token_map.gate[:depth, :num_tokens].numpy()
        if gate.any():
            strengths = strengths * _are_open(token_map.gates, gate)
    tokens = np.flatnonzero(strengths.any(0))
    if not len(tokens):
        return
    which = token_map.directions[:depth, :num_tokens].numpy()[:, tokens]
    weights, rows = strengths[:, tokens], hidden.numpy()
    x = rows[tokens] if residual is None else rows[tokens] + residual.numpy()[tokens]
    if directions.readings is not None:
        assert token_map.low is not None and token_map.high is not None
        bounds = (
            b[:depth, :num_tokens].numpy()[:, tokens] for b in (token_map.low, token_map.high)
        )
        weights = weights * _factors(directions.readings, layer, which, x, *bounds)
    vectors = directions.vectors[layer].numpy()
    change = vectors[which[0]] * weights[0, :, None]
    for k in range(1, depth):
        change += vectors[which[k]] * weights[k, :, None]
    if directions.is_rotation is not None:
        turns = (directions.is_rotation.numpy()[which] * weights != 0).any(0)
        if turns.any():
            change[turns] = _turned(x[turns], change[turns])
    rows[tokens] += change


def _are_open(gates: Gates, gate: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which of some gates are open."""
    is_open: npt.NDArray[np.bool_] = (
        gates.verdicts.numpy()[gate].sum(-1) >= gates.needed.numpy()[gate]
    )
    return is_open


def _factors(
    readings: Readings,
    layer: int,
    which: IntArray,
    x: FloatArray,
    low: FloatArray,
    high: FloatArray,
) -> FloatArray:
    """What the strengths ``[K, S]`` of tokens ``x [S, width]`` are multiplied by."""
    gains = readings.gains.numpy()[which]
    factors: FloatArray = gains[:, :, 0].copy()
    if gains[:, :, 1].any():
        factors += gains[:, :, 1] * np.sqrt(np.einsum("sw,sw->s", x, x))
    reader = readings.reader_of.numpy()[which]
    if (reader >= 0).any():
        row = np.maximum(reader, 0)
        readers = readings.vectors[layer].numpy()
        a = np.stack([np.einsum("sw,sw->s", x, readers[of_dose]) for of_dose in row])
        a += readings.bias[layer].numpy()[row]
        is_active = (reader >= 0) & (a > readings.threshold[layer].numpy()[row])
        activation = np.where(is_active, a, np.float32(0))
        factors += gains[:, :, 2] * np.clip(activation, low, high) + gains[:, :, 3] * activation
    return factors


def _turned(x: FloatArray, change: FloatArray) -> FloatArray:
    """What is added to tokens that keep their norm."""
    steered = x + change
    norm = np.maximum(np.linalg.norm(steered, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    turned: FloatArray = steered / norm * np.linalg.norm(x, axis=1, keepdims=True) - x
    return turned


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
