"""The token map of a step in one Triton kernel."""

import torch
import triton
import triton.language as tl

from vllm_steer.kernels.guidance.operands import PLACEHOLDER_STRIDE, TokenMap, TokenRules

# A program's tile: 8 numbers for each thread of 4 warps, and enough programs for a card even where
# a decode step has few tokens.
TOKENS, LAYERS, WARPS = 128, 8, 4

_RULES = (
    *("direction_start", "direction_stride", "step0_position", "begin", "end"),
    *("strength", "slope", "layers", "pool_offset", "strength_pool"),
)

# Each differs from step to step: a kernel specialised on one would compile while it serves.
_VARYING = (
    *_RULES,
    *("text_only", "placeholder_bounds", "num_bounds", "bound_search_steps"),
    *("low", "high", "gate", "low_of_token", "high_of_token", "gate_of_token"),
    *("pool_size", "num_spans", "num_rows", "num_layers", "search_steps"),
    *("query_start_loc", "positions", "num_tokens"),
    *("directions", "directions_dose", "directions_token"),
    *("strengths", "strengths_layer", "strengths_dose", "strengths_token"),
)


@triton.jit
def _row_of(tokens, query_start_loc, num_rows, search_steps):
    """How many requests end at or before each token, which is the number of its own request."""
    low = tl.zeros_like(tokens)
    high = low + num_rows
    for _ in range(search_steps):
        middle = (low + high) // 2
        end = tl.load(query_start_loc + 1 + middle, mask=low < high, other=0)
        beyond = (low < high) & (end <= tokens)
        low = tl.where(beyond, middle + 1, low)
        high = tl.where(beyond, high, middle)
    return low


@triton.jit
def _is_text(row, position, bounds, num_bounds, search_steps, STRIDE: tl.constexpr):
    """Whether an even number of bounds is at or before each token, so that no pair holds it."""
    key = row.to(tl.int64) * STRIDE + position
    low = tl.zeros_like(row)
    high = low + num_bounds
    for _ in range(search_steps):
        middle = (low + high) // 2
        bound = tl.load(bounds + middle, mask=low < high, other=0)
        beyond = (low < high) & (bound <= key)
        low = tl.where(beyond, middle + 1, low)
        high = tl.where(beyond, high, middle)
    return low % 2 == 0


@triton.jit(do_not_specialize=_VARYING)
def _map(
    direction_start,
    direction_stride,
    step0_position,
    begin,
    end,
    strength,
    slope,
    layers,
    pool_offset,
    strength_pool,
    text_only,
    placeholder_bounds,
    num_bounds,
    bound_search_steps,
    pool_size: tl.int64,
    num_spans,
    num_rows,
    num_layers,
    search_steps,
    query_start_loc,
    positions,
    num_tokens,
    directions,
    directions_dose: tl.int64,
    directions_token: tl.int64,
    strengths,
    strengths_layer: tl.int64,
    strengths_dose: tl.int64,
    strengths_token: tl.int64,
    low,
    high,
    gate,
    low_of_token,
    high_of_token,
    gate_of_token,
    BOUNDED: tl.constexpr,
    GATED: tl.constexpr,
    TOKENS: tl.constexpr,
    LAYERS: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """The equations of ``TokenRules`` for one dose of a block of tokens in a block of layers.

    The rules are ``[K, R]``, ``[S, K, R]`` and ``[L, K, R]`` without gaps; a program takes one of
    the K. What ends in ``of_token`` has the strides of ``directions``.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    dose = tl.program_id(1)
    row = _row_of(token, query_start_loc, num_rows, search_steps)
    rule = dose * num_rows + row
    in_step = token < num_tokens
    has_row = in_step & (row < num_rows)
    position = tl.load(positions + token, mask=in_step, other=0).to(tl.int64)
    acts = has_row & (token < 0)
    for span in range(num_spans):
        bound = (span * tl.num_programs(1) + dose) * num_rows + row
        after = position >= tl.load(begin + bound, mask=has_row, other=0)
        acts = acts | (has_row & after & (position < tl.load(end + bound, mask=has_row, other=0)))
    # Without bounds there is nothing to search and nothing to load.
    has_bounds = tl.zeros_like(row) < num_bounds
    leaves_out = tl.load(text_only + rule, mask=acts & has_bounds, other=0)
    is_text = _is_text(row, position, placeholder_bounds, num_bounds, bound_search_steps, STRIDE)
    acts = acts & ((leaves_out == 0) | is_text)
    # Elsewhere the step stays 0: far from its steps the line would leave float32.
    step = tl.where(acts, position - tl.load(step0_position + rule, mask=acts, other=0), 0)
    fall = tl.load(slope + rule, mask=acts, other=0.0) * step.to(tl.float32)
    size = tl.load(strength + rule, mask=acts, other=0.0) * (1 - fall)
    offset = tl.load(pool_offset + rule, mask=acts, other=-1)
    is_dynamic, pool_index = offset >= 0, offset + step
    inside = is_dynamic & (pool_index >= 0) & (pool_index < pool_size)
    size = tl.where(is_dynamic, tl.load(strength_pool + pool_index, mask=inside, other=0.0), size)
    token = token.to(tl.int64)
    if tl.program_id(2) == 0:
        direction = tl.load(direction_start + rule, mask=acts, other=0)
        direction += tl.load(direction_stride + rule, mask=acts, other=0) * step
        at = dose * directions_dose + token * directions_token
        tl.store(directions + at, direction.to(tl.int32), mask=in_step)
        if BOUNDED:
            tl.store(low_of_token + at, tl.load(low + rule, mask=acts, other=0.0), mask=in_step)
            tl.store(high_of_token + at, tl.load(high + rule, mask=acts, other=0.0), mask=in_step)
        if GATED:
            number = tl.load(gate + rule, mask=acts, other=0)
            tl.store(gate_of_token + at, number.to(tl.int32), mask=in_step)
    layer = (tl.program_id(2) * LAYERS + tl.arange(0, LAYERS)).to(tl.int64)[:, None]
    of_layer = layers + layer * tl.num_programs(1) * num_rows
    acts_there = tl.load(
        of_layer + rule[None, :], mask=(layer < num_layers) & acts[None, :], other=0.0
    )
    pointers = strengths + layer * strengths_layer + dose * strengths_dose
    tl.store(
        pointers + token[None, :] * strengths_token,
        size[None, :] * acts_there,
        mask=(layer < num_layers) & in_step[None, :],
    )


def map_tokens(
    rules: TokenRules, query_start_loc: torch.Tensor, positions: torch.Tensor, out: TokenMap
) -> None:
    """Write the map of the step's T tokens into the front of ``out``; see ``TokenRules``.

    ``query_start_loc [R + 1]`` holds each request's first token, ``positions [T]`` each token's
    place in its request. TokenRules that are views with gaps are copied first; an engine's are not.
    """
    num_tokens = positions.shape[0]
    num_layers, num_doses, num_rows = rules.layers.shape
    if num_tokens == 0 or num_doses == 0:
        return
    text_only, bounds = rules.text_only, rules.placeholder_bounds
    num_bounds = 0 if text_only is None or bounds is None else bounds.shape[0]
    grid = (triton.cdiv(num_tokens, TOKENS), num_doses, triton.cdiv(num_layers, LAYERS))
    _map[grid](
        *(getattr(rules, name).contiguous() for name in _RULES),
        *((text_only, bounds) if num_bounds else (rules.begin, rules.begin)),
        *(num_bounds, num_bounds.bit_length()),
        *(rules.strength_pool.shape[0], rules.begin.shape[0]),
        *(num_rows, num_layers, num_rows.bit_length()),
        *(query_start_loc.contiguous(), positions.contiguous(), num_tokens),
        *(out.directions, *out.directions.stride()),
        *(out.strengths, *out.strengths.stride()),
        *_values(rules, out),
        BOUNDED=out.low is not None,
        GATED=out.gate is not None,
        TOKENS=TOKENS,
        LAYERS=LAYERS,
        STRIDE=PLACEHOLDER_STRIDE,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )


def _values(rules: TokenRules, out: TokenMap) -> list[torch.Tensor]:
    """The rules' bounds and gates and their buffers; of those that are not there others, unread."""
    names, pairs = ("low", "high", "gate"), []
    for name in names:
        values, buffer = getattr(rules, name), getattr(out, name)
        pairs.append((rules.strength, out.strengths) if buffer is None else (values, buffer))
    return [values.contiguous() for values, _ in pairs] + [buffer for _, buffer in pairs]


def warm_up_map(device: torch.device, *, bounded: bool = False, gated: bool = False) -> None:
    """Compile what ``map_tokens`` launches: one kernel for each dtype that positions have.

    ``bounded`` and ``gated``: maps have bounds and gates.
    """
    integer = torch.zeros(1, 1, dtype=torch.int64, device=device)
    number = torch.zeros(1, 1, device=device)
    rules = TokenRules(
        *(integer,) * 3,
        begin=integer[None],
        end=integer[None],
        strength=number,
        slope=number,
        layers=number[None],
        pool_offset=integer,
        strength_pool=number[0],
        low=number,
        high=number,
        gate=integer,
    )
    query_start_loc = torch.tensor([0, 1], dtype=torch.int32, device=device)
    for dtype in (torch.int64, torch.int32):
        index = integer.to(torch.int32)
        out = TokenMap(
            index,
            number[None],
            low=number if bounded else None,
            high=number if bounded else None,
            gate=index if gated else None,
        )
        map_tokens(rules, query_start_loc, integer[0].to(dtype), out)
