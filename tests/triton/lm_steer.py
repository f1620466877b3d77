"""Steers, batches and weights that the tests of LM-Steer's Triton backends have in common."""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from lm_steer_cases import Use, Weights, steered

from vllm_steer.kernels.lm_steer import LMSteerBackend, SteeredRows, SteerWeights
from vllm_steer.kernels.lm_steer.metadata import BatchMetadata, RowSums, Tiles
from vllm_steer.kernels.lm_steer.triton_rowwise import ROWWISE
from vllm_steer.kernels.lm_steer.triton_tiled import TILED

BACKENDS: dict[str, LMSteerBackend] = {"tiled": TILED, "rowwise": ROWWISE}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES_OF_SLOTS = [(1, 1, 0), (2, 5, 1), None, (1, 17, 0), (3, 11, 2), (1, 64, 0), (2, 64, 1)]
"""Columns, their rank and how many are fixed: in all ranks 1, 10, 17, 33, 64, 128."""

backends = pytest.mark.parametrize("backend", list(BACKENDS))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def some_steers(width: int, dtype: torch.dtype, device: torch.device) -> list[Weights]:
    """Low ranks and constants, with and without fixed columns; a change is as large as its row."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def multiplying(columns: int, rank: int, fixed: int) -> Weights:
        first, second = normal(columns, width, rank), normal(columns, width, rank)
        return Weights(first, second, fixed, power_of_two(width * columns * rank))

    steers = [
        multiplying(*shape) if shape else Weights(None, normal(1, width, 1), 0, 0.5)
        for shape in SHAPES_OF_SLOTS
    ]
    return [*steers, Weights(None, normal(2, width, 1), 1, 0.5), multiplying(1, 33, 0)]


def power_of_two(size: int) -> float:
    """About ``1 / sqrt(size)``, exact in every dtype, as its product with a strength is."""
    return 2.0 ** -round(math.log2(size) / 2)


NUM_SLOTS = len(SHAPES_OF_SLOTS) + 2
CROWD_FROM = 10


def uses_of(layout: str, num_rows: int) -> list[Use]:
    """Which rows take which slots; strengths are exact in float32."""
    strengths = itertools.cycle([3.0, -1.5, 0.25, 0.0, -2.0])
    random = np.random.default_rng(3)
    if layout == "off":
        return []
    if layout.startswith("all-"):
        return [(row, int(layout[4:]), next(strengths)) for row in range(num_rows)]
    if layout == "distinct":
        return [(row, row % NUM_SLOTS, next(strengths)) for row in range(num_rows)]
    if layout == "zipf":
        slots = np.minimum(random.zipf(1.5, num_rows), NUM_SLOTS) - 1
        return [(row, int(slot), next(strengths)) for row, slot in enumerate(slots) if row % 8]
    if layout == "crowd":  # more rows of one slot than a tile holds, with rows of every slot
        crowd = [(row, 4, next(strengths)) for row in range(CROWD_FROM, num_rows)]
        return uses_of("one-to-four", min(CROWD_FROM, num_rows)) + crowd
    assert layout == "one-to-four"
    return [
        (row, int(slot), next(strengths))
        for row in range(num_rows)
        for slot in random.permutation(NUM_SLOTS)[: 1 + row % 4]
    ]


def moved(uses: list[Use], to: dict[int, int]) -> list[Use]:
    """The uses of some rows, moved to other row indices."""
    return [(to[row], slot, strength) for row, slot, strength in uses if row in to]


@contextmanager
def nan_in_fresh_memory(device: torch.device) -> Iterator[None]:
    """Whatever ``torch.empty`` returns is NaN, so an unwritten output or workspace shows."""
    before = torch.are_deterministic_algorithms_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        for dtype in DTYPES:
            assert torch.empty(99, dtype=dtype, device=device).isnan().all(), "memory is not filled"
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filling


def run(backend: str, x: torch.Tensor, weights: SteerWeights, rows: SteeredRows) -> torch.Tensor:
    metadata = BACKENDS[backend].prepare(rows, weights, x.device)
    with nan_in_fresh_memory(x.device):
        return BACKENDS[backend].steer_rows(x, weights, metadata)


def steer(
    backend: str, x: torch.Tensor, weights: SteerWeights, steers: list[Weights], uses: list[Use]
) -> torch.Tensor:
    return run(backend, x, weights, steered(uses, steers))


def in_a_frame(x: torch.Tensor, filling: float = torch.nan) -> torch.Tensor:
    """``x`` as a window of a larger tensor that is otherwise filled with ``filling``."""
    frame = x.new_full((x.shape[0] + 8, x.shape[1] + 16), filling)
    window = frame[4:-4, 8:-8]
    window.copy_(x)
    return window


def spoilt_but(weights: SteerWeights, slot: int) -> SteerWeights:
    """The weights with NaN everywhere except in ``slot``, and NaN before and after them."""
    kind, *numbers = weights.columns.kinds[slot], *weights.columns.bounds[slot]
    low_rank = range(numbers[0], numbers[2]) if kind == 0 else []
    whole = [number for number in numbers[:2] if number >= 0]
    return replace(
        weights,
        shrink=_kept(weights.shrink, low_rank),
        expand=_kept(weights.expand, low_rank),
        dense=_kept(weights.dense, whole if kind == 1 else []),
        vectors=_kept(weights.vectors, whole if kind == 2 else []),
    )


def _kept(table: torch.Tensor, entries: range | list[int]) -> torch.Tensor:
    frame = table.new_full((table.shape[0] + 32, *table.shape[1:]), torch.nan)
    window = frame[16:-16]
    for entry in entries:
        window[entry] = table[entry]
    return window


def padded(metadata: BatchMetadata, pairs: int, tiles: int, work: int, rows: int) -> BatchMetadata:
    """The same batch in longer weights, every part there, as a CUDA graph's buffers have them.

    Missing entries begin with -1; the rest of them is garbage that must not be read.
    """
    device = metadata.rows.device
    single = torch.arange(metadata.rows.shape[0] + 1, dtype=torch.int32, device=device)
    sums = metadata.sums or RowSums(metadata.rows, single, single[:-1])
    return BatchMetadata(
        rows=_longer(metadata.rows, pairs, NONSENSE),
        scales=_longer(metadata.scales, pairs, torch.nan),
        low_rank=_longer_tiles(metadata.low_rank, tiles, device),
        work=_longer(
            torch.empty(0, 2, dtype=torch.int32, device=device)
            if metadata.work is None
            else metadata.work,
            work,
            NONSENSE,
            first=-1,
        ),
        dense=_longer_tiles(metadata.dense, tiles, device),
        constant=_longer_tiles(metadata.constant, tiles, device),
        sums=RowSums(
            rows=_longer(sums.rows, rows, -1),
            starts=_longer(sums.starts, rows + 1, NONSENSE),
            order=_longer(sums.order, pairs, NONSENSE),
        ),
        touched=-1,
    )


NONSENSE = 10**9


def _longer_tiles(tiles: Tiles | None, length: int, device: torch.device) -> Tiles:
    if tiles is None:
        bounds = torch.empty(0, 5, dtype=torch.int32, device=device)
        tiles = Tiles(bounds, torch.empty(0, device=device))
    return Tiles(
        _longer(tiles.bounds, length, NONSENSE, first=-1),
        _longer(tiles.epsilons, length, torch.nan),
    )


def _longer(
    table: torch.Tensor, length: int, filling: float, first: float | None = None
) -> torch.Tensor:
    """``table`` with ``length`` entries; ``first`` is the first number of those added."""
    added = table.new_full((length - table.shape[0], *table.shape[1:]), filling)
    if first is not None:
        added[:, 0] = first
    return torch.cat([table, added])
