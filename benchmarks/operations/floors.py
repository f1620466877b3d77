"""The fewest bytes and the operations of each case: every input once, every output once.

``itemsize`` is that of the model's dtype. Formulas: an LM-Steer's weights are two factors of rank r
or their product where that is smaller, once per steer in the batch; each row is read and written,
for the result is a new tensor. Guidance reads and writes the rows of steered tokens only, in place.
"""


def weight_elements(width: int, rank: int) -> int:
    """Numbers of one LM-Steer as the bank keeps it."""
    return min(2 * width * rank, width * width)


def lm_steer_bytes(width: int, *, ranks: list[int], rows: int, itemsize: int) -> int:
    """``ranks``: those of the distinct steers that the batch uses."""
    weights = sum(weight_elements(width, rank) for rank in ranks)
    return itemsize * (weights + 2 * rows * width)


def lm_steer_flops(width: int, pair_ranks: list[int]) -> int:
    """``pair_ranks``: the rank of every pair of row and steer."""
    return sum(2 * weight_elements(width, rank) for rank in pair_ranks)


def guidance_bytes(
    width: int, *, steered: int, doses: int, directions: int, residual: bool, itemsize: int
) -> int:
    """One layer: ``steered`` rows in and out (the residual in), the ``directions`` in use in
    float32, and 8 bytes of the map per dose.
    """
    rows = steered * width * itemsize * (3 if residual else 2)
    return rows + 4 * directions * width + 8 * steered * doses


def guidance_flops(width: int, *, steered: int, doses: int, rotate: bool) -> int:
    """Per number: a product and a sum per dose; turning takes two norms and a factor more."""
    return steered * width * (2 * doses + (7 if rotate else 0))


def token_map_bytes(*, tokens: int, requests: int, layers: int, doses: int) -> int:
    """The map written, the rules, positions and first tokens read."""
    written = 4 * doses * tokens * (1 + layers)
    rules = doses * requests * (6 * 8 + 2 * 4 + 4 * layers)
    return written + rules + 8 * tokens + 4 * (requests + 1)


def divergence_bytes(doses: int, vocab: int, *, itemsize: int) -> int:
    """Base and probe of every dose once; a KL in float32 and a size per dose."""
    return doses * (2 * vocab * itemsize + 12)
