"""The Triton kernels of changes that depend on the token, and of conditions.

``steer_reading`` is for sites with a direction whose strength depends on the token, and for engines
with conditions; ``read_conditions`` writes the verdicts of a step's tests. One program per token;
numbers are float32 between load and store. ``DOSES`` is a power of two, ``depth`` or more.
"""

import triton
import triton.language as tl

from vllm_steer.kernels.guidance.triton_fused_kernels import (
    _any_rotates,
    _pointers,
    _ratio,
    _stream,
    _write,
)

_VARYING = (
    *("hidden", "hidden_row", "hidden_column"),
    *("residual", "residual_row", "residual_column"),
    *("vectors", "vectors_row", "vectors_column"),
    *("readers", "readers_row", "readers_column"),
    *("turns", "reader_of", "gains", "bias", "threshold"),
    *("which", "which_dose", "which_token", "low", "high", "gate", "verdicts", "needed"),
    *("strengths", "strengths_dose", "strengths_token", "depth"),
    *("measure", "sign"),
)


@triton.jit
def _tanh(x):
    """To the precision of float32, also near 0."""
    square = x * x
    near = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
    decay = tl.exp(-2 * tl.abs(x))
    far = tl.where(x < 0, -1.0, 1.0) * (1 - decay) / (1 + decay)
    return tl.where(square < 0.01, near, far)


@triton.jit
def _at(values, k, doses):
    """The ``k``-th of some values side by side."""
    return tl.sum(tl.where(doses == k, values, 0.0), axis=0)


@triton.jit
def _open_strengths(
    strength, gate, acts, verdicts, needed, DOSES: tl.constexpr, VERDICTS: tl.constexpr
):
    """The strengths of doses whose gates are open, 0 for the others."""
    number = tl.load(gate, mask=acts, other=0)
    column = tl.arange(0, VERDICTS)
    held = tl.load(
        verdicts + number[:, None] * VERDICTS + column[None, :], mask=acts[:, None], other=0.0
    )
    is_open = tl.sum(held, axis=1) >= tl.load(needed + number, mask=acts, other=0.0)
    return tl.where(is_open, strength, 0.0)


@triton.jit
def _readings(
    row,
    residual_address,
    reader,
    table,
    depth,
    DOSES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """``x . vectors[reader[k]]`` of every dose, 0 where it has no reader; and ``|x|``."""
    readers, readers_row, readers_column = table
    doses = tl.arange(0, DOSES)
    dots = tl.zeros([DOSES], tl.float32)
    square = tl.zeros([BLOCK], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        _, x = _stream(row, residual_address, columns, WIDTH, ALIGNED, RESIDUAL)
        square += x * x
        for k in range(depth):
            number = tl.sum(tl.where(doses == k, reader, 0), axis=0)
            if number >= 0:
                pointers = _pointers(
                    (readers, number.to(tl.int64), readers_row, readers_column), columns, ALIGNED
                )
                u = tl.load(pointers, mask=columns < WIDTH, other=0.0)
                dots += tl.where(doses == k, tl.sum(x * u, axis=0), 0.0)
    return dots, tl.sqrt_rn(tl.sum(square, axis=0))


@triton.jit
def _changes(
    weights,
    direction,
    table,
    columns,
    depth,
    DOSES: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """``sum_k weights[k] * vectors[direction[k], columns]`` in ascending order of k."""
    vectors, vectors_row, vectors_column = table
    doses = tl.arange(0, DOSES)
    change = tl.zeros(columns.shape, tl.float32)
    for k in range(depth):
        weight = _at(weights, k, doses)
        if weight != 0:
            number = tl.sum(tl.where(doses == k, direction, 0), axis=0).to(tl.int64)
            pointers = _pointers((vectors, number, vectors_row, vectors_column), columns, ALIGNED)
            change += weight * tl.load(pointers, mask=columns < WIDTH, other=0.0)
    return change


@triton.jit(do_not_specialize=_VARYING)
def steer_reading(
    hidden,
    hidden_row: tl.int64,
    hidden_column: tl.int64,
    residual,
    residual_row: tl.int64,
    residual_column: tl.int64,
    vectors,
    vectors_row: tl.int64,
    vectors_column: tl.int64,
    readers,
    readers_row: tl.int64,
    readers_column: tl.int64,
    turns,
    reader_of,
    gains,
    bias,
    threshold,
    which,
    which_dose: tl.int64,
    which_token: tl.int64,
    strengths,
    strengths_dose: tl.int64,
    strengths_token: tl.int64,
    low,
    high,
    gate,
    verdicts,
    needed,
    depth,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    DOSES: tl.constexpr,
    VERDICTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROTATES: tl.constexpr,
    READS: tl.constexpr,
    GATED: tl.constexpr,
):
    """``x = hidden[t] + residual[t]`` becomes ``x + change``, at the norm of ``x`` if a dose turns.

    The change is that of ``Readings``, of doses whose gates are open.
    """
    token = tl.program_id(0).to(tl.int64)
    doses = tl.arange(0, DOSES)
    at = doses * which_dose + token * which_token
    strength = tl.load(
        strengths + doses * strengths_dose + token * strengths_token, mask=doses < depth, other=0.0
    )
    if GATED:
        strength = _open_strengths(
            strength, gate + at, strength != 0, verdicts, needed, DOSES, VERDICTS
        )
    acts = strength != 0
    if tl.sum(acts.to(tl.int32), axis=0) == 0:
        return
    direction = tl.load(which + at, mask=acts, other=0)
    row = (hidden, token, hidden_row, hidden_column)
    residual_address = (residual, token, residual_row, residual_column)
    if READS:
        reader = tl.load(reader_of + direction, mask=acts, other=-1)
        has_reader = acts & (reader >= 0)
        dots, norm = _readings(
            row,
            residual_address,
            tl.where(has_reader, reader, -1),
            (readers, readers_row, readers_column),
            depth,
            DOSES,
            WIDTH,
            BLOCK,
            ALIGNED,
            RESIDUAL,
        )
        a = dots + tl.load(bias + reader, mask=has_reader, other=0.0)
        is_active = has_reader & (a > tl.load(threshold + reader, mask=has_reader, other=0.0))
        activation = tl.where(is_active, a, 0.0)
        lowest = tl.load(low + at, mask=acts, other=0.0)
        highest = tl.load(high + at, mask=acts, other=0.0)
        clipped = tl.minimum(tl.maximum(activation, lowest), highest)
        gain = gains + direction * 4
        factor = tl.load(gain, mask=acts, other=0.0)
        factor += tl.load(gain + 1, mask=acts, other=0.0) * norm
        factor += tl.load(gain + 2, mask=acts, other=0.0) * clipped
        factor += tl.load(gain + 3, mask=acts, other=0.0) * activation
        weights = tl.where(acts, strength * factor, 0.0)
    else:
        weights = strength
    table = (vectors, vectors_row, vectors_column)
    rotates = tl.sum(acts.to(tl.int32), axis=0) < 0
    ratio = 1.0
    if ROTATES:
        rotates = _any_rotates(acts, which + token * which_token, which_dose, turns, DOSES)
        before = tl.zeros([BLOCK], tl.float32)
        after = tl.zeros([BLOCK], tl.float32)
        if rotates:
            for start in range(0, WIDTH, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                _, x = _stream(row, residual_address, columns, WIDTH, ALIGNED, RESIDUAL)
                steered = x + _changes(
                    weights, direction, table, columns, depth, DOSES, WIDTH, ALIGNED
                )
                before += x * x
                after += steered * steered
        ratio = _ratio(before, after)
    for start in range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        stream = _stream(row, residual_address, columns, WIDTH, ALIGNED, RESIDUAL)
        change = _changes(weights, direction, table, columns, depth, DOSES, WIDTH, ALIGNED)
        _write(row, columns, stream, change, rotates, ratio, WIDTH, ALIGNED, RESIDUAL)


@triton.jit(do_not_specialize=_VARYING)
def read_conditions(
    hidden,
    hidden_row: tl.int64,
    hidden_column: tl.int64,
    residual,
    residual_row: tl.int64,
    residual_column: tl.int64,
    vectors,
    vectors_row: tl.int64,
    vectors_column: tl.int64,
    measure,
    sign,
    threshold,
    which,
    which_dose: tl.int64,
    which_token: tl.int64,
    strengths,
    strengths_dose: tl.int64,
    strengths_token: tl.int64,
    gate,
    verdicts,
    depth,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    DOT: tl.constexpr,
    CAST: tl.constexpr,
):
    """The equations of ``Conditions`` for every test of a token; a verdict that holds becomes 1."""
    token = tl.program_id(0).to(tl.int64)
    row = (hidden, token, hidden_row, hidden_column)
    residual_address = (residual, token, residual_row, residual_column)
    for k in range(depth):
        if tl.load(strengths + k * strengths_dose + token * strengths_token) != 0:
            at = k * which_dose + token * which_token
            number = tl.load(which + at).to(tl.int64)
            dots = tl.zeros([BLOCK], tl.float32)
            square = tl.zeros([BLOCK], tl.float32)
            for start in range(0, WIDTH, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                _, x = _stream(row, residual_address, columns, WIDTH, ALIGNED, RESIDUAL)
                unit = tl.load(
                    _pointers((vectors, number, vectors_row, vectors_column), columns, ALIGNED),
                    mask=columns < WIDTH,
                    other=0.0,
                )
                dots += x * unit
                square += x * x
            dot = tl.sum(dots, axis=0)
            norm = tl.sqrt_rn(tl.sum(square, axis=0))
            kind = tl.load(measure + number)
            similarity = dot
            if kind == CAST:
                similarity, bent = _bent(
                    row,
                    residual_address,
                    (vectors, number, vectors_row, vectors_column),
                    dot,
                    WIDTH,
                    BLOCK,
                    ALIGNED,
                    RESIDUAL,
                )
                norm = norm * bent
            if kind != DOT:
                similarity = tl.where(norm == 0, 0.0, similarity / tl.where(norm == 0, 1.0, norm))
            direction = tl.load(sign + number)
            if direction * similarity > direction * tl.load(threshold + number):
                tl.store(verdicts + tl.load(gate + at).to(tl.int64), 1.0)


@triton.jit
def _bent(
    row,
    residual_address,
    vector,
    dot,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """``x . y`` and ``|y|`` of ``y = tanh(dot * unit)``."""
    dots = tl.zeros([BLOCK], tl.float32)
    square = tl.zeros([BLOCK], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        _, x = _stream(row, residual_address, columns, WIDTH, ALIGNED, RESIDUAL)
        unit = tl.load(_pointers(vector, columns, ALIGNED), mask=columns < WIDTH, other=0.0)
        y = _tanh(dot * unit)
        dots += x * y
        square += y * y
    return tl.sum(dots, axis=0), tl.sqrt_rn(tl.sum(square, axis=0))
