"""Activation guidance in Triton: all doses of a token in one pass over its row.

A token's result depends on nothing but the token: programs share no sums, block sizes follow from
the width alone, and products are not contracted. No host synchronisation, no memory of its own: the
calls can be captured in a CUDA graph and replayed with another map in the same buffers.
"""

from typing import Any

import torch
import triton

from vllm_steer.kernels.guidance.operands import (
    CAST,
    DOT,
    Conditions,
    Directions,
    Gates,
    TokenMap,
)
from vllm_steer.kernels.guidance.torch_gather import step_changes
from vllm_steer.kernels.guidance.triton_fused_kernels import add, rotate
from vllm_steer.kernels.guidance.triton_map import map_tokens, warm_up_map
from vllm_steer.kernels.guidance.triton_reading_kernels import read_conditions, steer_reading

__all__ = [
    "map_tokens",
    "read_conditions_",
    "steer_tokens_",
    "step_changes",
    "warm_up",
    "warm_up_conditions",
]

# An addition splits a row among programs, so that a decode step of few tokens fills the GPU; a
# rotation needs the norms of the whole row, so one program reads the row in the largest blocks.
ADD_BLOCK, ROTATE_BLOCK = 1024, 4096
# What depends on the token passes over the row more than once; the blocks are those that do not
# spill.
READING_BLOCK, READING_ROTATE_BLOCK = 4096, 2048


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
    table, doses = _strided(vectors), _strided(token_map.directions, strengths)
    constants = {
        "WIDTH": width,
        "DOSES": triton.next_power_of_2(token_map.directions.shape[0]),
        "enable_fp_fusion": False,
    }
    if directions.readings is not None or token_map.gate is not None:
        _steer_reading_(hidden, residual, directions, layer, token_map, depth, constants)
        return
    if directions.is_rotation is None:
        block, num_warps = _block(width, ADD_BLOCK)
        add[(num_tokens, triton.cdiv(width, block))](
            *_strided(hidden),
            *table,
            *doses,
            depth,
            BLOCK=block,
            ALIGNED=_aligned(hidden, vectors),
            num_warps=num_warps,
            **constants,
        )
        return
    residual_or_hidden = hidden if residual is None else residual
    block, num_warps = _block(width, ROTATE_BLOCK)
    rotate[(num_tokens,)](
        *_strided(hidden, residual_or_hidden),
        *table,
        directions.is_rotation,
        *doses,
        depth,
        BLOCK=block,
        ALIGNED=_aligned(hidden, residual_or_hidden, vectors),
        RESIDUAL=residual is not None,
        num_warps=num_warps,
        **constants,
    )


def _steer_reading_(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    directions: Directions,
    layer: int,
    token_map: TokenMap,
    depth: int,
    constants: dict[str, Any],
) -> None:
    """``steer_tokens_`` where a change depends on the token, or on a gate."""
    vectors, strengths = directions.vectors[layer], token_map.strengths[layer]
    readings, gates = directions.readings, token_map.gates
    residual_or_hidden = hidden if residual is None else residual
    readers = vectors if readings is None else readings.vectors[layer]
    nothing = strengths  # for what is not there, and not read
    most = READING_BLOCK if directions.is_rotation is None else READING_ROTATE_BLOCK
    block, num_warps = _block(hidden.shape[1], most)
    steer_reading[(hidden.shape[0],)](
        *_strided(hidden, residual_or_hidden, vectors, readers),
        nothing if directions.is_rotation is None else directions.is_rotation,
        *(
            (nothing,) * 4
            if readings is None
            else (
                readings.reader_of,
                readings.gains,
                readings.bias[layer],
                readings.threshold[layer],
            )
        ),
        *_strided(token_map.directions, strengths),
        *(nothing if buffer is None else buffer for buffer in (token_map.low, token_map.high)),
        token_map.directions if token_map.gate is None else token_map.gate,
        *((nothing, nothing) if gates is None else (gates.verdicts, gates.needed)),
        depth,
        BLOCK=block,
        VERDICTS=1 if gates is None else gates.verdicts.shape[1],
        ALIGNED=_aligned(hidden, residual_or_hidden, vectors, readers),
        RESIDUAL=residual is not None,
        ROTATES=directions.is_rotation is not None,
        READS=readings is not None,
        GATED=token_map.gate is not None and gates is not None,
        num_warps=num_warps,
        **constants,
    )


def read_conditions_(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    conditions: Conditions,
    layer: int,
    token_map: TokenMap,
    depth: int,
) -> None:
    """Write 1 to the verdict of every condition that holds at a token tested for it."""
    num_tokens, width = hidden.shape
    if num_tokens == 0:
        return
    assert token_map.gate is not None and token_map.gates is not None
    vectors = conditions.vectors[layer]
    residual_or_hidden = hidden if residual is None else residual
    block, num_warps = _block(width, READING_BLOCK)
    read_conditions[(num_tokens,)](
        *_strided(hidden, residual_or_hidden, vectors),
        conditions.measure,
        conditions.sign,
        conditions.threshold,
        *_strided(token_map.directions, token_map.strengths[layer]),
        token_map.gate,
        token_map.gates.verdicts,
        depth,
        WIDTH=width,
        BLOCK=block,
        ALIGNED=_aligned(hidden, residual_or_hidden, vectors),
        RESIDUAL=residual is not None,
        DOT=DOT,
        CAST=CAST,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )


def warm_up_conditions(
    conditions: Conditions, dtype: torch.dtype, *, num_tests: int, gates: Gates
) -> None:
    """Compile every kernel that ``conditions`` can need, for streams in ``dtype``."""
    device, width = conditions.vectors.device, conditions.vectors.shape[2]
    warm_up_map(device, gated=True)
    index = torch.zeros(num_tests, 1, dtype=torch.int32, device=device)
    strengths = torch.zeros(1, num_tests, 1, device=device)
    token_map = TokenMap(index, strengths, gate=index, gates=gates)
    for spacing in (1, 2):
        hidden = torch.zeros(1, spacing * width, dtype=dtype, device=device)[:, ::spacing]
        for residual in (None, hidden):
            read_conditions_(hidden, residual, conditions, 0, token_map, num_tests)


def warm_up(
    directions: Directions,
    *,
    hidden_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    num_doses: int,
    gates: Gates | None = None,
) -> None:
    """Compile every kernel that ``directions`` can need, so that no request waits for one.

    ``num_doses`` is the K of the token map. What compiles: the map; and for rows of 16-byte pieces
    and for any others, the addition, or the turn with and (unless ``residual_dtype`` is None)
    without a residual.
    """
    device, width = directions.vectors.device, directions.vectors.shape[2]
    has_bounds = directions.readings is not None
    warm_up_map(device, bounded=has_bounds, gated=gates is not None)
    numbers = torch.zeros(num_doses, 1, device=device)
    index = torch.zeros(num_doses, 1, dtype=torch.int32, device=device)
    token_map = TokenMap(
        index,
        numbers[None],
        low=numbers if has_bounds else None,
        high=numbers if has_bounds else None,
        gate=None if gates is None else index,
        gates=gates,
    )
    for spacing in (1, 2):
        shape = (1, spacing * width)
        hidden = torch.zeros(shape, dtype=hidden_dtype, device=device)[:, ::spacing]
        steer_tokens_(hidden, None, directions, 0, token_map, num_doses)
        if residual_dtype is not None and directions.needs_stream:
            residual = torch.zeros(shape, dtype=residual_dtype, device=device)[:, ::spacing]
            steer_tokens_(hidden, residual, directions, 0, token_map, num_doses)


def _strided(*tensors: torch.Tensor) -> list[torch.Tensor | int]:
    """Each tensor, followed by its strides."""
    operands: list[torch.Tensor | int] = []
    for tensor in tensors:
        operands += [tensor, *tensor.stride()]
    return operands


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
