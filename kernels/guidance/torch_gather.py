"""Activation guidance in plain PyTorch: every token gathers its directions.

No host synchronisation, no shape that depends on data: the calls can be captured in a CUDA graph
and replayed with another map in the same buffers.
"""

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
    """Write the map of the step's T tokens into the front of ``out``; see ``TokenRules``.

    ``query_start_loc [R + 1]`` holds each request's first token, ``positions [T]`` each token's
    place in its request.
    """
    num_tokens = positions.shape[0]
    tokens = torch.arange(num_tokens, device=positions.device, dtype=query_start_loc.dtype)
    rows = torch.searchsorted(query_start_loc[1:], tokens, right=True)
    step = positions - rules.step0_position[:, rows]
    acts = (positions >= rules.begin[:, rows]) & (positions < rules.end[:, rows])
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


def step_changes(
    rules: TokenRules,
    query_start_loc: torch.Tensor,
    positions: torch.Tensor,
    directions: Directions,
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
    vectors = directions.vectors[layer]
    change = _change(vectors, which, strengths)
    if directions.is_rotation is None:
        hidden.add_(change)
        return
    x = hidden.float() if residual is None else hidden.float() + residual.float()
    steered = x + change
    norm = steered.norm(dim=1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
    turned = steered.div_(norm).mul_(x.norm(dim=1, keepdim=True)).sub_(x)
    turning = (directions.is_rotation[which] * strengths != 0).any(dim=0)
    hidden.add_(torch.where(turning[:, None], turned, change))


def warm_up(
    directions: Directions,
    *,
    hidden_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    num_doses: int,
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
