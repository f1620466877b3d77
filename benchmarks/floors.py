"""The fewest bytes of each operation and of a decode step: every input once, every output once.

``itemsize`` is that of the model's dtype. An LM-Steer's weights are two factors or their product
where that is smaller, once per steer in the batch; each row is read and written. Guidance reads and
writes the rows of steered tokens, in place.
"""

from benchmarks.dummy_model import Shape


def weight_elements(width: int, rank: int) -> int:
    """Numbers of one LM-Steer as the bank keeps it."""
    return min(2 * width * rank, width * width)


def lm_steer_bytes(width: int, *, rank: int, rows: int, distinct: int, itemsize: int) -> int:
    """``rows`` rows that take ``distinct`` steers, one each."""
    return itemsize * (distinct * weight_elements(width, rank) + 2 * rows * width)


def guidance_bytes(
    width: int, *, tokens: int, doses: int, directions: int, residual: bool, itemsize: int
) -> int:
    """One layer: rows in and out (the residual in), the ``directions`` in use in float32, and 8
    bytes of the map per dose.
    """
    rows = tokens * width * itemsize * (3 if residual else 2)
    return rows + 4 * directions * width + 8 * tokens * doses


def divergence_bytes(doses: int, vocab: int, *, itemsize: int) -> int:
    """Base and probe of every dose once; a KL in float32 and a size per dose."""
    return doses * (2 * vocab * itemsize + 12)


def guided_step_bytes(shape: Shape, *, rows: int, itemsize: int) -> int:
    """Guiding ``rows`` rows in every layer: each row in and out, its direction in float32."""
    return shape.layers * rows * shape.hidden_size * (2 * itemsize + 4)


def step_bytes(shape: Shape, *, rows: int, context: int, itemsize: int) -> int:
    """An unsteered decode step: weights once, keys and values per row."""
    return itemsize * (shape.read_params + rows * context * shape.kv_size)
