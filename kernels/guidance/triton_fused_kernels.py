"""The Triton kernels that steer tokens: one for addition, one for addition and rotation.

Numbers are float32 between load and store. ``ALIGNED`` says that every row of every tensor is made
of 16-byte pieces, ``RESIDUAL`` that there is one; ``DOSES`` is a power of two, ``depth`` or more.
"""

import triton
import triton.language as tl

from vllm_steer.kernels.rounding import rounded

# Each differs from call to call: a kernel specialised on one would compile while it serves.
_VARYING = (
    *("hidden", "hidden_row", "hidden_column"),
    *("residual", "residual_row", "residual_column"),
    *("vectors", "vectors_row", "vectors_column", "turns"),
    *("which", "which_dose", "which_token"),
    *("strengths", "strengths_dose", "strengths_token", "depth"),
)


@triton.jit
def _pointers(row, columns, ALIGNED: tl.constexpr):
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
def _any_rotates(acts, which, which_dose, turns, DOSES: tl.constexpr):
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
            pointers = _pointers(
                (vectors, direction, vectors_row, vectors_column), columns, ALIGNED
            )
            change += strength * tl.load(pointers, mask=columns < WIDTH, other=0.0)
    return change


@triton.jit(do_not_specialize=_VARYING)
def add(
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
    pointers = _pointers((hidden, token, hidden_row, hidden_column), columns, ALIGNED)
    x = tl.load(pointers, mask=columns < WIDTH, other=0.0).to(tl.float32)
    doses = (which, which_dose, strengths, strengths_dose, depth)
    table = (vectors, vectors_row, vectors_column)
    steered = x + _change(doses, table, columns, WIDTH, ALIGNED)
    tl.store(pointers, rounded(steered, hidden.dtype.element_ty), mask=columns < WIDTH)


@triton.jit
def _stream(
    row,
    residual_address,
    columns,
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """``hidden`` and ``x = hidden + residual`` at some columns of a token, in float32."""
    pointers = _pointers(row, columns, ALIGNED)
    hidden = tl.load(pointers, mask=columns < WIDTH, other=0.0).to(tl.float32)
    if RESIDUAL:
        residual_pointers = _pointers(residual_address, columns, ALIGNED)
        x = hidden + tl.load(residual_pointers, mask=columns < WIDTH, other=0.0).to(tl.float32)
    else:
        x = hidden
    return hidden, x


@triton.jit
def _ratio(before, after):
    """``|x| / |x + change|`` from their squares, finite where ``x + change`` is 0 and stays it."""
    norm_before = tl.sqrt_rn(tl.sum(before, axis=0))
    norm_after = tl.sqrt_rn(tl.sum(after, axis=0))
    return tl.div_rn(norm_before, tl.where(norm_after == 0, 1.0, norm_after))


@triton.jit
def _write(
    row,
    columns,
    stream,
    change,
    rotates,
    ratio,
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """The stream becomes ``(x + change) ratio``, or ``x + change`` where it does not turn."""
    hidden, x = stream
    steered = (x + change) * tl.where(rotates, ratio, 1.0)
    if RESIDUAL:
        steered = hidden + tl.where(rotates, steered - x, change)
    pointers = _pointers(row, columns, ALIGNED)
    tl.store(pointers, rounded(steered, pointers.dtype.element_ty), mask=columns < WIDTH)


@triton.jit(do_not_specialize=_VARYING)
def rotate(
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
    residual_address = (residual, token, residual_row, residual_column)
    doses = (which, which_dose, strengths, strengths_dose, depth)
    table = (vectors, vectors_row, vectors_column)
    rotates = _any_rotates(acts, which, which_dose, turns, DOSES)
    columns = tl.arange(0, BLOCK)
    if WIDTH <= BLOCK:
        stream = _stream(row, residual_address, columns, WIDTH, ALIGNED, RESIDUAL)
        change = _change(doses, table, columns, WIDTH, ALIGNED)
        x, steered = stream[1], stream[1] + change
        ratio = _ratio(x * x, steered * steered)
        _write(row, columns, stream, change, rotates, ratio, WIDTH, ALIGNED, RESIDUAL)
    else:
        before = tl.zeros([BLOCK], tl.float32)
        after = tl.zeros([BLOCK], tl.float32)
        if rotates:
            for start in range(0, WIDTH, BLOCK):
                _, x = _stream(row, residual_address, start + columns, WIDTH, ALIGNED, RESIDUAL)
                steered = x + _change(doses, table, start + columns, WIDTH, ALIGNED)
                before += x * x
                after += steered * steered
        ratio = _ratio(before, after)
        for start in range(0, WIDTH, BLOCK):
            block_columns = start + columns
            stream = _stream(row, residual_address, block_columns, WIDTH, ALIGNED, RESIDUAL)
            change = _change(doses, table, block_columns, WIDTH, ALIGNED)
            _write(row, block_columns, stream, change, rotates, ratio, WIDTH, ALIGNED, RESIDUAL)
