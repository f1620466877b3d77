"""The Triton kernels of the divergence: one finds a row's most likely tokens, one sums over them.

A row's most likely tokens are those above a *threshold*, and of those at the threshold the ones
with the lowest ids. The threshold is found by narrowing an interval of *keys*: integers in the
order of the logits, made from the bits of a float32 with the negative numbers inverted. Each pass
over the row sums the weights of the tokens above four keys inside the interval, which reduces the
interval to a fifth. After the first pass the interval holds few tokens, and a block of the row
without any of them costs one comparison.

Weights are ``exp(logit - highest)`` in float32. Each lane adds its tokens in the order of the row,
and the lanes are added in a fixed tree in float64: a result depends on its row only.
"""

import triton
import triton.language as tl

_RULED_OUT = tl.constexpr(-2139095041)  # the key of a logit of -inf


@triton.jit
def _logits(row, columns, VOCAB: tl.constexpr):
    """A block of logits of a row in float32; -inf beyond its end."""
    return tl.load(row + columns, mask=columns < VOCAB, other=-float("inf")).to(tl.float32)


@triton.jit
def _keys(x, SHIFT: tl.constexpr):
    """Integers in the order of ``x``; equal logits have equal keys.

    ``SHIFT`` is the number of low bits that are 0 in all logits: 16 for bfloat16 logits.
    """
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # -0 is 0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _highest(row, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """A row's highest logit and the sum of its weights in float64; NaN if it is not a distribution.

    Online softmax: each lane keeps its highest logit so far, and its sum relative to that.
    """
    lane = tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, VOCAB, BLOCK):
        x = _logits(row, start + lane, VOCAB)
        higher = tl.maximum(highest, x)
        unit = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(highest - unit) + tl.exp(x - unit)
        highest = higher
    most = tl.max(highest, axis=0)
    return most, tl.sum((total * tl.exp(highest - most)).to(tl.float64), axis=0)


@triton.jit
def _above(
    row,
    highest,
    bad,
    good,
    t0,
    t1,
    t2,
    t3,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Of the tokens with ``bad < key <= good``, the weight and number above each of four keys."""
    lane = tl.arange(0, BLOCK)
    w0 = tl.zeros((BLOCK,), tl.float32)
    w1 = tl.zeros((BLOCK,), tl.float32)
    w2 = tl.zeros((BLOCK,), tl.float32)
    w3 = tl.zeros((BLOCK,), tl.float32)
    n0 = tl.zeros((BLOCK,), tl.int32)
    n1 = tl.zeros((BLOCK,), tl.int32)
    n2 = tl.zeros((BLOCK,), tl.int32)
    n3 = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, VOCAB, BLOCK):
        x = _logits(row, start + lane, VOCAB)
        key = _keys(x, SHIFT)
        inside = (key > bad) & (key <= good)
        if tl.max(inside.to(tl.int32), axis=0) > 0:
            weight = tl.where(inside, tl.exp(x - highest), 0.0)
            one = inside.to(tl.int32)
            w0 += tl.where(key > t0, weight, 0.0)
            w1 += tl.where(key > t1, weight, 0.0)
            w2 += tl.where(key > t2, weight, 0.0)
            w3 += tl.where(key > t3, weight, 0.0)
            n0 += tl.where(key > t0, one, 0)
            n1 += tl.where(key > t1, one, 0)
            n2 += tl.where(key > t2, one, 0)
            n3 += tl.where(key > t3, one, 0)
    return (
        tl.sum(w0.to(tl.float64), axis=0),
        tl.sum(w1.to(tl.float64), axis=0),
        tl.sum(w2.to(tl.float64), axis=0),
        tl.sum(w3.to(tl.float64), axis=0),
        tl.sum(n0, axis=0),
        tl.sum(n1, axis=0),
        tl.sum(n2, axis=0),
        tl.sum(n3, axis=0),
    )


@triton.jit
def _narrowed(
    row,
    highest,
    limit,
    interval,
    t0,
    t1,
    t2,
    t3,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Cut the interval at four ascending keys; return the part that contains the threshold.

    An interval is ``(bad, good, above, count)``: the tokens above ``good`` weigh ``above``, which
    is within ``limit``; those above ``bad`` weigh more; ``count`` or fewer have their keys in
    ``bad < key <= good``.
    """
    bad, good, above, count = interval
    w0, w1, w2, w3, n0, n1, n2, n3 = _above(
        row, highest, bad, good, t0, t1, t2, t3, VOCAB, BLOCK, SHIFT
    )
    g0 = above + w0 <= limit
    g1 = above + w1 <= limit
    g2 = above + w2 <= limit
    g3 = above + w3 <= limit
    bad = tl.where(g0, bad, tl.where(g1, t0, tl.where(g2, t1, tl.where(g3, t2, t3))))
    good = tl.where(g0, t0, tl.where(g1, t1, tl.where(g2, t2, tl.where(g3, t3, good))))
    more = tl.where(g0, w0, tl.where(g1, w1, tl.where(g2, w2, tl.where(g3, w3, 0.0))))
    count = tl.where(
        g0,
        count - n0,
        tl.where(g1, n0 - n1, tl.where(g2, n1 - n2, tl.where(g3, n2 - n3, n3))),
    )
    return bad, good, above + more, count


@triton.jit
def _between(bad, good, part: tl.constexpr):
    """The key at ``part`` fifths of the way from ``bad`` to ``good``."""
    span = good.to(tl.int64) - bad.to(tl.int64)
    return (bad.to(tl.int64) + span * part // 5).to(tl.int32)


@triton.jit
def _ties(row, bad, good, VOCAB: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr):
    """The highest logit with ``bad < key <= good``, -inf without any, and how many there are."""
    lane = tl.arange(0, BLOCK)
    logit = tl.full((BLOCK,), -float("inf"), tl.float32)
    number = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, VOCAB, BLOCK):
        x = _logits(row, start + lane, VOCAB)
        key = _keys(x, SHIFT)
        inside = (key > bad) & (key <= good)
        logit = tl.maximum(logit, tl.where(inside, x, -float("inf")))
        number += inside.to(tl.int32)
    return tl.max(logit, axis=0), tl.sum(number, axis=0)


@triton.jit
def _nth(row, threshold, nth, VOCAB: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr):
    """The ``nth`` token at the threshold, counted from 1 in the order of tokens."""
    lane = tl.arange(0, BLOCK)
    num_before = nth * 0
    token = nth * 0
    for start in range(0, VOCAB, BLOCK):
        at = _keys(_logits(row, start + lane, VOCAB), SHIFT) == threshold
        number = tl.sum(at.to(tl.int32), axis=0)
        if (num_before < nth) & (num_before + number >= nth):
            so_far = num_before + tl.cumsum(at.to(tl.int32), axis=0)
            token = tl.max(tl.where(at & (so_far <= nth), start + lane, 0), axis=0)
        num_before += number
    return token


@triton.jit
def likeliest(
    logits,
    row_stride,
    rows,
    top_p,
    highest,
    thresholds,
    last_ties,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """A row's most likely tokens up to and including the one that crosses ``top_p``; one program
    per (row, p).

    These are the tokens with a key above ``thresholds``, and those at it up to the id
    ``last_ties``. ``highest`` is the row's highest logit, NaN for a row that is not a distribution.
    """
    program = tl.program_id(0)
    row = logits + tl.load(rows + program) * row_stride
    p = tl.load(top_p + program)
    most, total = _highest(row, VOCAB, BLOCK)
    limit = p.to(tl.float64) * total
    low = tl.full((), _RULED_OUT, tl.int32) >> SHIFT
    searched = (p < 1) & (total == total)
    high = tl.where(searched, _keys(most, SHIFT), low)
    above = total * 0.0
    count = tl.full((), VOCAB, tl.int32)
    if searched:
        low, high, above, count = _narrowed(
            row,
            most,
            limit,
            (low, high, above, count),
            _keys(most - 12, SHIFT),
            _keys(most - 6, SHIFT),
            _keys(most - 3, SHIFT),
            _keys(most - 1, SHIFT),
            VOCAB,
            BLOCK,
            SHIFT,
        )
    while (high.to(tl.int64) - low.to(tl.int64) > 1) & (count > 1):
        low, high, above, count = _narrowed(
            row,
            most,
            limit,
            (low, high, above, count),
            _between(low, high, 1),
            _between(low, high, 2),
            _between(low, high, 3),
            _between(low, high, 4),
            VOCAB,
            BLOCK,
            SHIFT,
        )
    logit, number = _ties(row, low, high, VOCAB, BLOCK, SHIFT)
    threshold = tl.where(number > 0, _keys(logit, SHIFT), high)
    weight = tl.exp(logit - most).to(tl.float64)
    within = tl.where(weight > 0, (limit - above) / tl.where(weight > 0, weight, 1.0), number)
    num_ties = tl.minimum(within, number.to(tl.float64)).to(tl.int32) + 1
    last = tl.where(number > 0, VOCAB, -1)
    if (num_ties < number) & (number > 0):
        last = _nth(row, threshold, num_ties, VOCAB, BLOCK, SHIFT)
    tl.store(highest + program, tl.where(total == total, most, float("nan")))
    tl.store(thresholds + program, threshold)
    tl.store(last_ties + program, last)


@triton.jit
def _among(key, token, threshold, last_tie):
    """Mask of the tokens that are among the most likely of their row."""
    return (key > threshold) | ((key == threshold) & (token <= last_tie))


@triton.jit(do_not_specialize=["num_doses"])
def divergence(
    logits,
    row_stride,
    rows,
    highest,
    thresholds,
    last_ties,
    kls,
    sizes,
    num_doses,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """KL and size of ``Q`` of a dose; one program per dose, with the rows of ``likeliest``.

    With ``w`` the weights, and ``m`` their sums over ``Q``:
    ``sum w0 (ln w0 - ln w1) / m0 - ln m0 + ln m1``, 0 for equal distributions.
    """
    dose = tl.program_id(0)
    probe = dose + num_doses
    row0 = logits + tl.load(rows + dose) * row_stride
    row1 = logits + tl.load(rows + probe) * row_stride
    most0 = tl.load(highest + dose)
    most1 = tl.load(highest + probe)
    threshold0 = tl.load(thresholds + dose)
    threshold1 = tl.load(thresholds + probe)
    last0 = tl.load(last_ties + dose)
    last1 = tl.load(last_ties + probe)
    lane = tl.arange(0, BLOCK)
    terms = tl.zeros((BLOCK,), tl.float32)
    m0 = tl.zeros((BLOCK,), tl.float32)
    m1 = tl.zeros((BLOCK,), tl.float32)
    size = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, VOCAB, BLOCK):
        token = start + lane
        x0 = _logits(row0, token, VOCAB)
        x1 = _logits(row1, token, VOCAB)
        chosen = _among(_keys(x0, SHIFT), token, threshold0, last0)
        chosen |= _among(_keys(x1, SHIFT), token, threshold1, last1)
        if tl.max(chosen.to(tl.int32), axis=0) > 0:
            w0 = tl.where(chosen, tl.exp(x0 - most0), 0.0)
            w1 = tl.where(chosen, tl.exp(x1 - most1), 0.0)
            # A token without weight adds nothing, even if both logits are -inf.
            terms += tl.where(w0 > 0, w0 * ((x0 - most0) - (x1 - most1)), 0.0)
            m0 += w0
            m1 += w1
            size += chosen.to(tl.int32)
    sum0 = tl.sum(m0.to(tl.float64), axis=0)
    sum1 = tl.sum(m1.to(tl.float64), axis=0)
    kl = tl.sum(terms.to(tl.float64), axis=0) / sum0 - tl.log(sum0) + tl.log(sum1)
    is_distribution = (most0 == most0) & (most1 == most1)
    tl.store(kls + dose, tl.where(is_distribution, kl, float("nan")).to(tl.float32))
    tl.store(sizes + dose, tl.sum(size, axis=0).to(tl.int64))
