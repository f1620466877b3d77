"""Activation guidance in float64, one token and one dose at a time."""

import torch

from vllm_steer.kernels.guidance.operands import (
    COSINE,
    DOT,
    PLACEHOLDER_STRIDE,
    Conditions,
    Directions,
    Readings,
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
    spans = zip(rules.begin[:, k, row].tolist(), rules.end[:, k, row].tolist(), strict=True)
    acts = any(begin <= position < end for begin, end in spans)
    if acts and not _is_left_out(rules, k, row, position):
        step = position - int(rules.step0_position[k, row])
        direction = int(rules.direction_start[k, row]) + int(rules.direction_stride[k, row]) * step
        strength = _strength(rules, k, row, step)
    out.directions[k, token] = direction
    out.strengths[:, k, token] = strength * rules.layers[:, k, row]
    for name in ("low", "high", "gate"):
        buffer, values = getattr(out, name), getattr(rules, name)
        if buffer is not None and values is not None:
            buffer[k, token] = values[k, row] if acts else 0


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
        residual_row = (
            torch.zeros_like(vectors[0]) if residual is None else residual[token].double()
        )
        x = hidden[token].double() + residual_row
        change = torch.zeros_like(vectors[0])
        rotates, touched = False, False
        for k in range(depth):
            strength = float(token_map.strengths[layer, k, token])
            direction = int(token_map.directions[k, token])
            if strength == 0 or not _is_open(token_map, k, token):
                continue
            touched = True
            rotates |= directions.is_rotation is not None and bool(
                directions.is_rotation[direction]
            )
            factor = _factor(directions.readings, layer, direction, x, token_map, k, token)
            change += strength * factor * vectors[direction]
        if not touched:
            continue
        steered = x + change
        if rotates and steered.any():
            steered *= x.norm() / steered.norm()
        hidden[token] = (steered - residual_row).to(hidden.dtype)


def _is_open(token_map: TokenMap, k: int, token: int) -> bool:
    if token_map.gate is None or token_map.gates is None:
        return True
    gate = int(token_map.gate[k, token])
    return float(token_map.gates.verdicts[gate].sum()) >= float(token_map.gates.needed[gate])


def _factor(
    readings: Readings | None,
    layer: int,
    direction: int,
    x: torch.Tensor,
    token_map: TokenMap,
    k: int,
    token: int,
) -> float:
    """What a strength is multiplied by; see ``Readings`` for the equations."""
    if readings is None:
        return 1.0
    activation, reader = 0.0, int(readings.reader_of[direction])
    if reader >= 0:
        a = float(x @ readings.vectors[layer, reader].double() + readings.bias[layer, reader])
        activation = a if a > float(readings.threshold[layer, reader]) else 0.0
    assert token_map.low is not None and token_map.high is not None
    low, high = float(token_map.low[k, token]), float(token_map.high[k, token])
    terms = (1.0, float(x.norm()), min(max(activation, low), high), activation)
    gains = readings.gains[direction].tolist()
    pairs = zip(gains, terms, strict=True)
    return float(sum(gain * term for gain, term in pairs if gain))


def read_conditions_(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    conditions: Conditions,
    layer: int,
    token_map: TokenMap,
    depth: int,
) -> None:
    """Write 1 to the verdict of every condition that holds at a token that is tested for it."""
    assert token_map.gate is not None and token_map.gates is not None
    verdicts = token_map.gates.verdicts.view(-1)
    for token in range(hidden.shape[0]):
        x = hidden[token].double() + (0 if residual is None else residual[token].double())
        for k in range(depth):
            if token_map.strengths[layer, k, token] == 0:
                continue
            number = int(token_map.directions[k, token])
            similarity = _similarity(conditions, layer, number, x)
            if (
                float(conditions.sign[number]) * (similarity - float(conditions.threshold[number]))
                > 0
            ):
                verdicts[int(token_map.gate[k, token])] = 1.0


def _similarity(conditions: Conditions, layer: int, number: int, x: torch.Tensor) -> float:
    unit, measure = conditions.vectors[layer, number].double(), int(conditions.measure[number])
    dot = float(x @ unit)
    if measure == DOT:
        return dot
    other = unit if measure == COSINE else torch.tanh(dot * unit)
    norms = float(x.norm() * other.norm())
    return float(x @ other) / norms if norms else 0.0
