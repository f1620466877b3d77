"""Block sizes of the LM-Steer kernels: a plain function of the bank's shape.

Nothing is tuned while serving, and nothing depends on the batch: the block sizes set the order of
the sum over the width, and a row's result must not depend on the other rows.

The arithmetic of tiles in 16 bits, for d = 4096, r = 1000 (8.2 MB a factor) on a card with 132
multiprocessors at 1.75 GHz and 5.5 TB/s from its L2 cache; none of this is measured:

- **Bytes in flight.** 4.3 TB/s at 0.8 us of latency need 3.4 MB (3.0 TB/s: 2.4 MB). A block of
  weights is 64 x 64, 8 KB, and 7 of 8 stages are in flight: 56 KB a program, so 60 programs are
  enough (31 bytes a cycle each, of 64 that a multiprocessor can load). With 96 KB of shared memory,
  two programs share a multiprocessor: one reads while the other starts or ends.
- **Shrink** cuts the width into chunks until a tile has 132 programs or more: here 160, 16 blocks
  of ranks by 10 chunks. Each chunk adds one partial sum to write and to reduce.
- **Expand** has no chunks. Their sum would need one more launch, 2.5 to 4 us, to gain at most 1 us.
  More programs without chunks have fewer columns each, and every program reads the whole product of
  the first factor: for 64 rows of one steer, 64 programs of 64 columns read 25 MB (4.5 us), 256
  programs of 16 columns 49 MB (9 us). So expand uses the widest block that has enough bytes in
  flight, and so does the dense product.
- **Rows.** Weights come first in a product, 64 at a time, so for every 64 weights ``64 + rows``
  numbers are written to and read from shared memory, at 128 bytes a cycle: enough for 11.8, 9.9 or
  7.4 TB/s of weights in tiles of 16, 32 or 64 rows (with 64 rows first and 32 ranks second it was
  4.9). Missing rows of a tile cost no memory traffic, but each tile reads its weights again: 64
  rows of one steer read 82, 49 or 33 MB from the L2 cache. 32 rows are the compromise.
- **Reduction in expand** saves a launch, but each program of expand then reads all partial sums: 8
  partial sums of 64 ranks and 32 rows are 4 MB a tile, 0.8 us; at r = 1000 they would be 82 MB. For
  this reason few programs shrink a low rank: 8 programs of 64 KB take about 0.3 us longer than 16.
"""

from dataclasses import dataclass

PROCESSORS = 132
"""Multiprocessors of an H100 or H200."""
IN_FLIGHT = 3_440_000
"""Bytes that have to be on their way for 4.3 TB/s at 0.8 us of latency."""
SHARED_BYTES = 96 * 1024
"""Shared memory of one program: two of them fit a multiprocessor's 227 KiB."""
WEIGHT_BYTES = 64 * 64 * 2
"""A block of 16-bit weights: what tensor cores take at once, by 128 bytes."""
FEW_CHUNKS = 8
"""Partial sums that expand folds itself at most,"""
FEW_RANKS = 128
"""of as many ranks at most."""


@dataclass(frozen=True)
class BlockSizes:
    """Block sizes of one bank.

    rows           pairs per tile
    shrink_ranks   ranks that one program of shrink computes, ``shrink_width`` columns at a time
    chunk          columns that one program of shrink reads; the width has ``chunks`` chunks
    expand_width   columns of the result per program, ``expand_ranks`` ranks at a time
    dense_out      columns of the dense product per program, ``dense_in`` at a time
    ..._stages     pipeline stages: blocks of a loop in shared memory, all but one in flight
    expand_folds   true if expand reduces the partial sums, false if a separate kernel does
    expand_parts   blocks of ranks that one program of expand multiplies at once (``packing``)
    dense_parts    blocks of columns that one program of the dense product multiplies at once
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
    shrink_stages: int = 1
    expand_stages: int = 1
    dense_stages: int = 1
    expand_folds: bool = True
    expand_parts: int = 1
    dense_parts: int = 1


def tile_sizes(
    width: int,
    max_rank: int,
    itemsize: int,
    *,
    rows: int = 32,
    columns: int = 64,
    few_chunks: int = FEW_CHUNKS,
) -> BlockSizes:
    """Block sizes for tiles of rows.

    A benchmark varies ``rows`` (16 to 64), the maximum ``columns`` of a program (16 to 64) and
    ``few_chunks`` in 16 bits; an engine uses the defaults, for the reasons above. Blocks are small
    for 32-bit products, which run on CUDA cores from registers, and for rows that are not aligned
    to 16 bytes (no usual model has such), which pass through registers too.
    """
    if itemsize == 4 or width % 16:
        ranks = min(16, _power_of_two(max_rank))
        chunk, chunks = _chunk(width, max_rank, ranks, block=32, programs=PROCESSORS)
        narrow = _narrow(width)
        folds = chunks <= FEW_CHUNKS and max_rank <= FEW_RANKS
        return BlockSizes(
            rows=16,
            shrink_ranks=ranks,
            shrink_width=32,
            chunk=chunk,
            chunks=chunks,
            expand_ranks=16,
            expand_width=narrow,
            dense_out=narrow,
            dense_in=32,
            shrink_stages=2,
            expand_stages=2,
            dense_stages=2,
            expand_folds=folds,
        )
    few = min(few_chunks, 256 // rows) if max_rank <= FEW_RANKS else 0  # all in registers at once
    chunk, chunks = _chunk(width, max_rank, 64, block=64, programs=PROCESSORS, max_chunks=few)
    folds = chunks <= few
    columns, stages = _columns_and_stages(width, rows, columns)
    return BlockSizes(
        rows=rows,
        shrink_ranks=64,
        shrink_width=64,
        chunk=chunk,
        chunks=chunks,
        expand_ranks=64,
        expand_width=64 if folds else columns,
        dense_out=columns,
        dense_in=64,
        shrink_stages=6,
        expand_stages=1 if folds else stages,
        dense_stages=stages,
        expand_folds=folds,
        expand_parts=1 if folds else 64 // columns,
        dense_parts=64 // columns,
    )


def row_sizes(width: int, max_rank: int) -> BlockSizes:
    """Block sizes for programs of one row.

    Without tensor cores nothing is pipelined, so each program loads as much at once as registers
    hold, 8 KB of 16-bit weights in shrink and 32 KB in expand, and there are many programs: at d =
    4096, r = 1000 a row has 500 programs of shrink and 128 of expand, 4 MB in flight in both.
    """
    ranks = min(16, _power_of_two(max_rank))
    chunk, chunks = _chunk(width, max_rank, ranks, block=256, programs=512)
    return BlockSizes(
        rows=1,
        shrink_ranks=ranks,
        shrink_width=256,
        chunk=chunk,
        chunks=chunks,
        expand_ranks=min(512, _power_of_two(max_rank)),
        expand_width=32,
        dense_out=16,
        dense_in=256,
    )


def _chunk(
    width: int, max_rank: int, ranks: int, *, block: int, programs: int, max_chunks: int = 0
) -> tuple[int, int]:
    """Chunk of the width and number of chunks: the longest chunk with at least ``programs``
    programs, of at least two blocks, and at most ``max_chunks`` chunks if that is not 0.
    """
    num_chunks = max(1, -(-programs // max(1, -(-max_rank // ranks))))
    blocks = -(-width // block)
    blocks_per_chunk = max(
        min(2, blocks), blocks // num_chunks, -(-blocks // max_chunks) if max_chunks else 1
    )
    chunk = blocks_per_chunk * block
    return chunk, -(-width // chunk)


def _columns_and_stages(width: int, rows: int, max_columns: int) -> tuple[int, int]:
    """The widest block of columns with enough bytes in flight for one tile (16 if there is none),
    and the number of stages that fit ``SHARED_BYTES``: a stage is 64 columns in parts by 64 numbers
    of weights, and as many of the rows.
    """
    columns = max_columns
    while True:
        stages = SHARED_BYTES // (WEIGHT_BYTES + 2 * 64 * rows * 64 // columns)
        programs = -(-width // columns)
        if columns == 16 or programs * (stages - 1) * WEIGHT_BYTES >= IN_FLIGHT:
            return columns, stages
        columns //= 2


def _narrow(width: int) -> int:
    """32 columns, or 16 if 32 give less than one program per multiprocessor."""
    return 32 if width >= 32 * PROCESSORS else 16


def _power_of_two(number: int) -> int:
    """The next power of two, at least 16: the possible sizes of a block."""
    return max(16, 1 << (number - 1).bit_length() if number > 0 else 1)
