"""Rounds float32 to the model's dtype inside a Triton kernel."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """``x`` (float32) in ``dtype``, to nearest, ties to even.

    A GPU rounds so by itself. Triton's interpreter cuts a bfloat16 off, so there the bits are
    rounded by hand first; what is left to cut is zero then.
    """
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # NaN stays NaN
    return x.to(dtype)
