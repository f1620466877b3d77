"""Activation guidance written out: one token and one dose at a time, in float64."""

import torch

from vllm_steer.kernels.guidance.operands import Directions, Rules, TokenMap


def map_tokens(
    rules: Rules, query_start_loc: torch.Tensor, positions: torch.Tensor, out: TokenMap
) -> None:
    """Write the map of the step's tokens into ``out``; see ``Rules`` for the equations."""
    for row in range(rules.start.shape[1]):
        for token in range(int(query_start_loc[row]), int(query_start_loc[row + 1])):
            for k in range(rules.start.shape[0]):
                _map_token(rules, k, row, token, int(positions[token]), out)


def _map_token(rules: Rules, k: int, row: int, token: int, position: int, out: TokenMap) -> None:
    direction, strength = 0, 0.0
    if rules.first[k, row] <= position < rules.last[k, row]:
        step = position - int(rules.origin[k, row])
        direction = int(rules.start[k, row]) + int(rules.stride[k, row]) * step
        strength = _strength(rules, k, row, step)
    out.directions[k, token] = direction
    out.strengths[:, k, token] = strength * rules.layers[:, k, row]


def _strength(rules: Rules, k: int, row: int, step: int) -> float:
    table = int(rules.table[k, row])
    if table < 0:
        return float(rules.strength[k, row]) * (1 - float(rules.slope[k, row]) * step)
    return float(rules.history[table + step]) if 0 <= table + step < len(rules.history) else 0.0


def steer_tokens_(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    directions: Directions,
    layer: int,
    token_map: TokenMap,
    depth: int,
) -> None:
    """``x = hidden + residual`` becomes ``x + change``, or that at ``x``'s norm where one turns."""
    vectors = directions.vectors[layer].double()
    for token in range(hidden.shape[0]):
        change = torch.zeros_like(vectors[0])
        turning, touched = False, False
        for k in range(depth):
            strength = float(token_map.strengths[layer, k, token])
            direction = int(token_map.directions[k, token])
            if strength != 0:
                touched = True
                turning |= directions.turns is not None and bool(directions.turns[direction])
                change += strength * vectors[direction]
        if not touched:
            continue
        kept = torch.zeros_like(change) if residual is None else residual[token].double()
        x = hidden[token].double() + kept
        steered = x + change
        if turning and steered.any():
            steered *= x.norm() / steered.norm()
        hidden[token] = (steered - kept).to(hidden.dtype)
