"""Products of weights and rows in the layout of tensor cores, weights first.

Hopper's tensor cores multiply 64 rows of weights (ranks or columns of the result) at once. If a
program computes fewer than 64 columns, so that there are more programs, the 64 rows are ``parts``
copies of the columns, and part p takes every block of the sum whose number is p modulo ``parts``:

    first   [parts * m, k]   weights of the m columns, each part at its own block of the sum
    second  [parts * n, k]   the n rows, each part at its own block
    product [parts * m, parts * n], of which only the diagonal blocks (a part with itself) are used
"""

import triton
import triton.language as tl

from vllm_steer.kernels.rounding import INTERPRETED, rounded


@triton.jit
def dot(a, b, acc):
    """``a b + acc`` in float32; the interpreter has no products of bfloat16."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load_x(x, at, mask, dtype: tl.constexpr):
    """A tile of ``x`` in the dtype of the weights."""
    tile = tl.load(x + at, mask=mask, other=0.0)
    if x.dtype.element_ty != dtype:
        tile = rounded(tile.to(tl.float32), dtype)
    return tile


@triton.jit
def summed_parts(product, PARTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """``[m, n]``: the sum of the diagonal blocks, in an order that depends on shapes only."""
    if PARTS == 1:
        return product
    of_first = tl.arange(0, PARTS * M) // M
    of_second = tl.arange(0, PARTS * N) // N
    product = tl.where(of_first[:, None] == of_second[None, :], product, 0.0)
    product = tl.reshape(product, (PARTS, M, PARTS, N))
    return tl.sum(tl.sum(product, axis=2), axis=0)
