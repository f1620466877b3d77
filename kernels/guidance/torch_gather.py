"""Activation guidance in plain PyTorch: every token gathers its directions.

No host synchronisation, no shape that depends on data: the calls can be captured in a CUDA graph
and replayed with another map in the same buffers.
"""

import torch

from vllm_steer.kernels.guidance.operands import (
    CAST,
    DOT,
    PLACEHOLDER_STRIDE,
    Conditions,
    Directions,
    Gates,
    Readings,
    TokenMap,
    TokenRules,
)


def map_tokens(
    rules: TokenRules, query_start_loc: torch.Tensor, positions: torch.Tensor, out: TokenMap
) -> None:
    """Write the map of the step's T tokens into the front of ``out``; see ``TokenRules``.

    ``query_start_loc [R + 1]`` holds each request's first token, ``positions [T]`` each token's
    place in its request.
    """
    num_tokens = positions.shape[0]
    tokens = torch.arange(num_tokens, device=positions.device, dtype=query_start_loc.dtype)
    rows = torch.searchsorted(query_start_loc[1:], tokens, right=True)
    step = positions - rules.step0_position[:, rows]
    begin, end = rules.begin[:, :, rows], rules.end[:, :, rows]
    acts = ((positions >= begin) & (positions < end)).any(0)
    if rules.text_only is not None and rules.placeholder_bounds is not None:
        keys = rows * PLACEHOLDER_STRIDE + positions
        is_placeholder = torch.searchsorted(rules.placeholder_bounds, keys, right=True) & 1
        acts &= (rules.text_only[:, rows] & is_placeholder) == 0
    direction = (rules.direction_start[:, rows] + rules.direction_stride[:, rows] * step) * acts
    strength = rules.strength[:, rows] * (1 - rules.slope[:, rows] * step)
    offset, pool_size = rules.pool_offset[:, rows], rules.strength_pool.shape[0]
    index = offset + step
    inside = (index >= 0) & (index < pool_size)
    dynamic = torch.where(inside, rules.strength_pool[index.clamp(0, pool_size - 1)], 0.0)
    strength = torch.where(offset < 0, strength, dynamic)
    strength = torch.where(acts, strength, 0.0)  # far from its steps it may be infinite
    out.directions[:, :num_tokens] = direction
    torch.mul(rules.layers[:, :, rows], strength, out=out.strengths[:, :, :num_tokens])
    for name in ("low", "high", "gate"):
        buffer, values = getattr(out, name), getattr(rules, name)
        if buffer is not None:
            buffer[:, :num_tokens] = torch.where(acts, values[:, rows], 0)


def step_changes(
    rules: TokenRules,
    query_start_loc: torch.Tensor,
    positions: torch.Tensor,
    directions: Directions,
    gates: Gates | None = None,
) -> None:
    """None: every step is mapped, and nothing is copied to the host."""


def steer_tokens_(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    directions: Directions,
    layer: int,
    token_map: TokenMap,
    depth: int,
) -> None:
    """Change ``hidden [T, width]`` in place by the first ``depth`` doses of each token.

    The stream ``x = hidden + residual`` becomes ``x + change``, or ``(x + change) |x| / |x +
    change|`` for a token with a direction that turns. Sums in float32, rounded once; a token
    without a dose keeps its value.
    """
    num_tokens = hidden.shape[0]
    which = token_map.directions[:depth, :num_tokens]
    strengths = token_map.strengths[layer, :depth, :num_tokens]
    if token_map.gate is not None and token_map.gates is not None:
        strengths = strengths * token_map.gates.are_open(token_map.gate[:depth, :num_tokens])
    vectors = directions.vectors[layer]
    if directions.is_rotation is None and directions.readings is None:
        hidden.add_(_change(vectors, which, strengths))
        return
    x = hidden.float() if residual is None else hidden.float() + residual.float()
    factors = strengths
    if directions.readings is not None:
        factors = strengths * _factors(directions.readings, layer, which, x, token_map)
        factors = torch.where(strengths != 0, factors, 0.0)  # padding may hold anything
    change = _change(vectors, which, factors)
    if directions.is_rotation is None:
        hidden.add_(change)
        return
    steered = x + change
    norm = steered.norm(dim=1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
    turned = steered.div_(norm).mul_(x.norm(dim=1, keepdim=True)).sub_(x)
    turning = (directions.is_rotation[which] * strengths != 0).any(dim=0)
    hidden.add_(torch.where(turning[:, None], turned, change))


def read_conditions_(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    conditions: Conditions,
    layer: int,
    token_map: TokenMap,
    depth: int,
) -> None:
    """Write 1 to the verdict of every condition that holds at a token that is tested for it.

    ``token_map`` has the condition of each token and test as its direction, a strength of 1 in the
    condition's layer, and the index of the verdict among all as its gate.
    """
    assert token_map.gate is not None and token_map.gates is not None
    num_tokens, verdicts = hidden.shape[0], token_map.gates.verdicts.view(-1)
    x = hidden.float() if residual is None else hidden.float() + residual.float()
    norm = x.norm(dim=1)
    for k in range(depth):
        which = token_map.directions[k, :num_tokens]
        units = conditions.vectors[layer].index_select(0, which)
        measure, dot = conditions.measure[which], (x * units).sum(1)
        bent = torch.tanh(dot[:, None] * units)
        of_bent = torch.where(measure == CAST, (x * bent).sum(1) / _positive(bent.norm(dim=1)), dot)
        similarity = torch.where(measure == DOT, dot, of_bent / _positive(norm))
        sign, threshold = conditions.sign[which], conditions.threshold[which]
        holds = (sign * similarity > sign * threshold) & (
            token_map.strengths[layer, k, :num_tokens] != 0
        )
        cells = torch.where(holds, token_map.gate[k, :num_tokens], 0).long()
        verdicts.scatter_reduce_(0, cells, holds.float(), "amax")


def _positive(norm: torch.Tensor) -> torch.Tensor:
    return norm.clamp_min(torch.finfo(norm.dtype).tiny)


def _factors(
    readings: Readings, layer: int, which: torch.Tensor, x: torch.Tensor, token_map: TokenMap
) -> torch.Tensor:
    """What the strengths ``[K, T]`` are multiplied by; see ``Readings`` for the equations."""
    assert token_map.low is not None and token_map.high is not None
    depth, num_tokens = which.shape
    low, high = token_map.low[:depth, :num_tokens], token_map.high[:depth, :num_tokens]
    reader = readings.reader_of[which]
    row = reader.clamp_min(0)
    dots = [(x * readings.vectors[layer].index_select(0, row[k])).sum(1) for k in range(depth)]
    a = torch.stack(dots) + readings.bias[layer][row]
    active = (reader >= 0) & (a > readings.threshold[layer][row])
    activation = torch.where(active, a, 0.0)
    gains = readings.gains[which].unbind(2)
    clipped = torch.minimum(torch.maximum(activation, low), high)
    factors: torch.Tensor = gains[0] + gains[1] * x.norm(dim=1)
    return factors + gains[2] * clipped + gains[3] * activation


def warm_up(
    directions: Directions,
    *,
    hidden_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    num_doses: int,
    gates: Gates | None = None,
) -> None:
    """Nothing to compile."""


def warm_up_conditions(
    conditions: Conditions, dtype: torch.dtype, *, num_tests: int, gates: Gates
) -> None:
    """Nothing to compile."""


def _change(vectors: torch.Tensor, which: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
    """``sum_k strengths[k, t] * vectors[which[k, t]]`` as ``[T, width]`` float32.

    Each product is rounded before it is added, as all backends do: bit for bit the same.
    """
    change = vectors.index_select(0, which[0]).mul_(strengths[0, :, None])
    for k in range(1, which.shape[0]):
        change.add_(vectors.index_select(0, which[k]).mul_(strengths[k, :, None]))
    return change
