"""Block sizes of the LM-Steer kernels: a plain function of the bank's shape.

Nothing is tuned while serving, and nothing depends on the batch: a row's result has to be the same
whatever rows come with it, and the sum over the width is cut where this says.
"""

from dataclasses import dataclass

WIDE = 4096
"""From this width on, wider blocks still make programs enough."""


@dataclass(frozen=True)
class BlockSizes:
    """Block sizes of one bank.

    rows           pairs per tile
    shrink_ranks   ranks that one program shrinks to, ``shrink_width`` columns at a time
    chunk          columns that one program shrinks in all; the width has ``chunks`` of them
    expand_width   columns of the result that one program makes, ``expand_ranks`` ranks at a time
    dense_out      columns of the dense product that one program makes, ``dense_in`` at a time
    stages         blocks in flight where a loop feeds tensor cores
    """

    rows: int
    shrink_ranks: int
    shrink_width: int
    chunk: int
    chunks: int
    expand_ranks: int
    expand_width: int
    dense_out: int
    dense_in: int
    stages: int


def tile_sizes(width: int, max_rank: int, itemsize: int) -> BlockSizes:
    """For tiles of rows.

    16-bit: 64 rows, the fewest that Hopper's tensor cores take as one, so a steer shared by the
    batch is read once per 64 rows; rows that a tile does not have cost no memory traffic. Split-K
    makes about 128 programs of a single tile at rank 1000, one per multiprocessor, each with three
    blocks of weights in flight: 3 MB in all, what 4 TB/s at 0.8 us of latency need. 32-bit products
    run on ordinary cores out of registers, and rows that do not begin at 16 bytes pass through
    registers too (no model of use has such): blocks are small there.
    """
    if itemsize == 4 or width % 16:
        ranks = min(16, _power_of_two(max_rank))
        chunk = _chunk(width, max_rank, ranks, block=32, programs=128)
        return BlockSizes(16, ranks, 32, *chunk, 16, 32, 16, 32, stages=2)
    ranks = min(32, _power_of_two(max_rank))
    chunk = _chunk(width, max_rank, ranks, block=128, programs=128)
    expand_width = 64 if width >= WIDE else 32
    return BlockSizes(64, ranks, 128, *chunk, 64, expand_width, 16, 128, stages=4)


def row_sizes(width: int, max_rank: int) -> BlockSizes:
    """For programs of one row.

    Without tensor cores nothing is pipelined, so each program takes as much at once as registers
    hold, 8 to 16 KiB of 16-bit weights, and there are many: 500 to shrink a row at rank 1000.
    """
    ranks = min(16, _power_of_two(max_rank))
    chunk = _chunk(width, max_rank, ranks, block=256, programs=512)
    expand_ranks = min(256, _power_of_two(max_rank))
    return BlockSizes(1, ranks, 256, *chunk, expand_ranks, 32, 16, 256, stages=1)


def _chunk(width: int, max_rank: int, ranks: int, *, block: int, programs: int) -> tuple[int, int]:
    """Chunk of the width and their number: about ``programs`` programs, two blocks each or more."""
    wanted = max(1, round(programs * ranks / max(1, max_rank)))
    most = max(1, width // (2 * block))
    chunk = -(-width // (min(wanted, most) * block)) * block
    return chunk, -(-width // chunk)


def _power_of_two(number: int) -> int:
    """The next power of two, 16 or more: what a block can have."""
    return max(16, 1 << (number - 1).bit_length() if number > 0 else 1)
