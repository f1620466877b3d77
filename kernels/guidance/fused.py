"""Activation guidance in Triton: all doses of a token in one pass over its row.

A token's result depends on nothing but the token: programs share no sums, block sizes follow from
the width alone, and products are not contracted. No host synchronisation, no memory of its own: the
calls can be captured in a CUDA graph and replayed with another map in the same buffers.
"""
# mypy: allow-untyped-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from vllm_steer.kernels.guidance.fused_map import map_tokens, warm_up_map
from vllm_steer.kernels.guidance.operands import Directions, TokenMap
from vllm_steer.kernels.rounding import rounded

__all__ = ["map_tokens", "steer_tokens_", "warm_up"]

# An addition splits a row among programs, so that a decode step of few tokens fills the card; a
# turn needs the norms of the whole row, so its one program takes as much of it at once as it can.
ADD_BLOCK, ROTATE_BLOCK = 1024, 4096

# Each differs from call to call: a kernel specialised on one would compile while it serves.
_VARYING = (
    *("hidden", "hidden_row", "hidden_column"),
    *("residual", "residual_row", "residual_column"),
    *("vectors", "vectors_row", "vectors_column", "turns"),
    *("which", "which_dose", "which_token"),
    *("strengths", "strengths_dose", "strengths_token", "depth"),
)


@triton.jit
def _places(row, columns, ALIGNED: tl.constexpr):
    """Pointers to columns of a row; where ALIGNED, the compiler may take 16 bytes at once."""
    base, index, row_stride, column_stride = row
    start = base + index * row_stride
    if ALIGNED:
        return tl.multiple_of(start, 16) + columns
    else:
        return start + columns.to(tl.int64) * column_stride


@triton.jit
def _doses(strengths, strengths_dose, depth, DOSES: tl.constexpr):
    """Which of a token's first ``depth`` doses act, side by side: memory is waited for once."""
    dose = tl.arange(0, DOSES)
    return tl.load(strengths + dose * strengths_dose, mask=dose < depth, other=0.0) != 0


@triton.jit
def _any_turns(acts, which, which_dose, turns, DOSES: tl.constexpr):
    """Whether a dose that acts has a direction that turns."""
    direction = tl.load(which + tl.arange(0, DOSES) * which_dose, mask=acts, other=0)
    turn = tl.load(turns + direction, mask=acts, other=0.0)
    return tl.sum((turn != 0).to(tl.int32), axis=0) > 0


@triton.jit
def _change(doses, table, columns, WIDTH: tl.constexpr, ALIGNED: tl.constexpr):
    """``sum_k strengths[k] * vectors[which[k], columns]`` in float32, in ascending order of k."""
    which, which_dose, strengths, strengths_dose, depth = doses
    vectors, vectors_row, vectors_column = table
    change = tl.zeros(columns.shape, tl.float32)
    for k in range(depth):
        strength = tl.load(strengths + k * strengths_dose)
        if strength != 0:
            direction = tl.load(which + k * which_dose).to(tl.int64)
            places = _places((vectors, direction, vectors_row, vectors_column), columns, ALIGNED)
            change += strength * tl.load(places, mask=columns < WIDTH, other=0.0)
    return change


@triton.jit(do_not_specialize=_VARYING)
def _add(
    hidden,
    hidden_row: tl.int64,
    hidden_column: tl.int64,
    vectors,
    vectors_row: tl.int64,
    vectors_column: tl.int64,
    which,
    which_dose: tl.int64,
    which_token: tl.int64,
    strengths,
    strengths_dose: tl.int64,
    strengths_token: tl.int64,
    depth,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    DOSES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """``hidden[t] += change``; one program per token and block of columns."""
    token = tl.program_id(0).to(tl.int64)
    strengths += token * strengths_token
    which += token * which_token
    if tl.sum(_doses(strengths, strengths_dose, depth, DOSES).to(tl.int32), axis=0) == 0:
        return
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    places = _places((hidden, token, hidden_row, hidden_column), columns, ALIGNED)
    x = tl.load(places, mask=columns < WIDTH, other=0.0).to(tl.float32)
    doses = (which, which_dose, strengths, strengths_dose, depth)
    table = (vectors, vectors_row, vectors_column)
    steered = x + _change(doses, table, columns, WIDTH, ALIGNED)
    tl.store(places, rounded(steered, hidden.dtype.element_ty), mask=columns < WIDTH)


@triton.jit
def _stream(row, kept, columns, WIDTH: tl.constexpr, ALIGNED: tl.constexpr, RESIDUAL: tl.constexpr):
    """``hidden`` and ``x = hidden + residual`` at some columns of a token, in float32."""
    places = _places(row, columns, ALIGNED)
    hidden = tl.load(places, mask=columns < WIDTH, other=0.0).to(tl.float32)
    if RESIDUAL:
        kept_places = _places(kept, columns, ALIGNED)
        x = hidden + tl.load(kept_places, mask=columns < WIDTH, other=0.0).to(tl.float32)
    else:
        x = hidden
    return hidden, x


@triton.jit
def _ratio(before, after):
    """``sqrt(sum before / sum after)``; 0 where ``x + change`` is 0 and so has no direction."""
    given = tl.sqrt_rn(tl.sum(before, axis=0))
    norm = tl.sqrt_rn(tl.sum(after, axis=0))
    return tl.where(norm == 0, 0.0, tl.div_rn(given, tl.where(norm == 0, 1.0, norm)))


@triton.jit
def _write(
    row,
    columns,
    stream,
    change,
    turning,
    ratio,
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """The stream becomes ``(x + change) ratio``, or ``x + change`` where it does not turn."""
    hidden, x = stream
    steered = (x + change) * tl.where(turning, ratio, 1.0)
    if RESIDUAL:
        steered = hidden + tl.where(turning, steered - x, change)
    places = _places(row, columns, ALIGNED)
    tl.store(places, rounded(steered, places.dtype.element_ty), mask=columns < WIDTH)


@triton.jit(do_not_specialize=_VARYING)
def _rotate(
    hidden,
    hidden_row: tl.int64,
    hidden_column: tl.int64,
    residual,
    residual_row: tl.int64,
    residual_column: tl.int64,
    vectors,
    vectors_row: tl.int64,
    vectors_column: tl.int64,
    turns,
    which,
    which_dose: tl.int64,
    which_token: tl.int64,
    strengths,
    strengths_dose: tl.int64,
    strengths_token: tl.int64,
    depth,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    DOSES: tl.constexpr,
    ALIGNED: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """``x = hidden[t] + residual[t]`` becomes ``(x + change) |x| / |x + change|``.

    A token none of whose doses turns takes ``hidden[t] += change``. One program per token: a row of
    one block stays in registers, a wider one is read twice, for its norms and for the result.
    """
    token = tl.program_id(0).to(tl.int64)
    strengths += token * strengths_token
    which += token * which_token
    acts = _doses(strengths, strengths_dose, depth, DOSES)
    if tl.sum(acts.to(tl.int32), axis=0) == 0:
        return
    row = (hidden, token, hidden_row, hidden_column)
    kept = (residual, token, residual_row, residual_column)
    doses = (which, which_dose, strengths, strengths_dose, depth)
    table = (vectors, vectors_row, vectors_column)
    turning = _any_turns(acts, which, which_dose, turns, DOSES)
    columns = tl.arange(0, BLOCK)
    if WIDTH <= BLOCK:
        stream = _stream(row, kept, columns, WIDTH, ALIGNED, RESIDUAL)
        change = _change(doses, table, columns, WIDTH, ALIGNED)
        x, steered = stream[1], stream[1] + change
        ratio = _ratio(x * x, steered * steered)
        _write(row, columns, stream, change, turning, ratio, WIDTH, ALIGNED, RESIDUAL)
    else:
        before = tl.zeros([BLOCK], tl.float32)
        after = tl.zeros([BLOCK], tl.float32)
        if turning:
            for start in range(0, WIDTH, BLOCK):
                _, x = _stream(row, kept, start + columns, WIDTH, ALIGNED, RESIDUAL)
                steered = x + _change(doses, table, start + columns, WIDTH, ALIGNED)
                before += x * x
                after += steered * steered
        ratio = _ratio(before, after)
        for start in range(0, WIDTH, BLOCK):
            here = start + columns
            stream = _stream(row, kept, here, WIDTH, ALIGNED, RESIDUAL)
            change = _change(doses, table, here, WIDTH, ALIGNED)
            _write(row, here, stream, change, turning, ratio, WIDTH, ALIGNED, RESIDUAL)


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
    change|`` for a token with a direction that turns. Sums in float32, rounded once; the row of a
    token without a dose is not touched.
    """
    num_tokens, width = hidden.shape
    if num_tokens == 0:
        return
    vectors, strengths = directions.vectors[layer], token_map.strengths[layer]
    operands = [*(vectors, *vectors.stride())]
    doses = [*(token_map.directions, *token_map.directions.stride())]
    doses += [*(strengths, *strengths.stride()), depth]
    constants = {
        "WIDTH": width,
        "DOSES": triton.next_power_of_2(token_map.directions.shape[0]),
        "enable_fp_fusion": False,
    }
    if directions.turns is None:
        block, num_warps = _block(width, ADD_BLOCK)
        _add[(num_tokens, triton.cdiv(width, block))](
            *(hidden, *hidden.stride()),
            *operands,
            *doses,
            BLOCK=block,
            ALIGNED=_aligned(hidden, vectors),
            num_warps=num_warps,
            **constants,
        )
        return
    kept = hidden if residual is None else residual
    block, num_warps = _block(width, ROTATE_BLOCK)
    _rotate[(num_tokens,)](
        *(hidden, *hidden.stride()),
        *(kept, *kept.stride()),
        *operands,
        directions.turns,
        *doses,
        BLOCK=block,
        ALIGNED=_aligned(hidden, kept, vectors),
        RESIDUAL=residual is not None,
        num_warps=num_warps,
        **constants,
    )


def warm_up(
    directions: Directions,
    *,
    hidden_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    num_doses: int,
) -> None:
    """Compile every kernel that ``directions`` can need, so that no request waits for one.

    ``num_doses`` is the K of the token map. What compiles: the map; and for rows of 16-byte pieces
    and for any others, the addition, or the turn with and (unless ``residual_dtype`` is None)
    without a residual.
    """
    device, width = directions.vectors.device, directions.vectors.shape[2]
    warm_up_map(device)
    token_map = TokenMap(
        torch.zeros(num_doses, 1, dtype=torch.int32, device=device),
        torch.zeros(1, num_doses, 1, device=device),
    )
    for spacing in (1, 2):
        shape = (1, spacing * width)
        hidden = torch.zeros(shape, dtype=hidden_dtype, device=device)[:, ::spacing]
        steer_tokens_(hidden, None, directions, 0, token_map, num_doses)
        if residual_dtype is not None and directions.turns is not None:
            residual = torch.zeros(shape, dtype=residual_dtype, device=device)[:, ::spacing]
            steer_tokens_(hidden, residual, directions, 0, token_map, num_doses)


def _block(width: int, most: int) -> tuple[int, int]:
    """The columns of a block and the warps that share it.

    A thread takes 8 columns: one load of 16 bytes of the 16-bit dtypes, two of float32, which keeps
    enough in flight without spilling. The same for every dtype and number of tokens.
    """
    block = min(triton.next_power_of_2(width), most)
    return block, max(1, block // 256)


def _aligned(*tensors: torch.Tensor) -> bool:
    """Whether all rows are of 16-byte pieces in every dtype: 8 numbers side by side."""
    return all(
        t.shape[1] % 8 == 0
        and t.stride(1) == 1
        and (t.data_ptr() | (t.stride(0) * t.element_size())) % 16 == 0
        for t in tensors
    )
