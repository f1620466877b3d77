"""Activation guidance in float64, one token and one dose at a time."""

import torch

from vllm_steer.kernels.guidance.operands import (
    PLACEHOLDER_STRIDE,
    Directions,
    TokenMap,
    TokenRules,
)


def map_tokens(
    rules: TokenRules, query_start_loc: torch.Tensor, positions: torch.Tensor, out: TokenMap
) -> None:
    """Write the map of the step's tokens into ``out``; see ``TokenRules`` for the equations."""
    for row in range(rules.direction_start.shape[1]):
        for token in range(int(query_start_loc[row]), int(query_start_loc[row + 1])):
            for k in range(rules.direction_start.shape[0]):
                _map_token(rules, k, row, token, int(positions[token]), out)


def _map_token(
    rules: TokenRules, k: int, row: int, token: int, position: int, out: TokenMap
) -> None:
    direction, strength = 0, 0.0
    acts = rules.begin[k, row] <= position < rules.end[k, row]
    if acts and not _is_left_out(rules, k, row, position):
        step = position - int(rules.step0_position[k, row])
        direction = int(rules.direction_start[k, row]) + int(rules.direction_stride[k, row]) * step
        strength = _strength(rules, k, row, step)
    out.directions[k, token] = direction
    out.strengths[:, k, token] = strength * rules.layers[:, k, row]


def _is_left_out(rules: TokenRules, k: int, row: int, position: int) -> bool:
    if rules.text_only is None or rules.placeholder_bounds is None or not rules.text_only[k, row]:
        return False
    ranges = rules.placeholder_bounds.view(-1, 2) - row * PLACEHOLDER_STRIDE
    return any(begin <= position < end for begin, end in ranges.tolist())


def _strength(rules: TokenRules, k: int, row: int, step: int) -> float:
    index = int(rules.pool_offset[k, row])
    if index < 0:
        return float(rules.strength[k, row]) * (1 - float(rules.slope[k, row]) * step)
    index += step
    return float(rules.strength_pool[index]) if 0 <= index < len(rules.strength_pool) else 0.0


def steer_tokens_(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    directions: Directions,
    layer: int,
    token_map: TokenMap,
    depth: int,
) -> None:
    """``x = hidden + residual`` becomes ``x + change``, rescaled to ``|x|`` if a dose rotates."""
    vectors = directions.vectors[layer].double()
    for token in range(hidden.shape[0]):
        change = torch.zeros_like(vectors[0])
        rotates, touched = False, False
        for k in range(depth):
            strength = float(token_map.strengths[layer, k, token])
            direction = int(token_map.directions[k, token])
            if strength != 0:
                touched = True
                rotates |= directions.is_rotation is not None and bool(
                    directions.is_rotation[direction]
                )
                change += strength * vectors[direction]
        if not touched:
            continue
        residual_row = torch.zeros_like(change) if residual is None else residual[token].double()
        x = hidden[token].double() + residual_row
        steered = x + change
        if rotates and steered.any():
            steered *= x.norm() / steered.norm()
        hidden[token] = (steered - residual_row).to(hidden.dtype)
