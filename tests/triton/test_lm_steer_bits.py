"""LM-Steer's Triton backends: unsteered rows are unchanged; a row's bits depend on the row only."""

import itertools

import numpy as np
import pytest
import torch
from lm_steer import (
    BACKENDS,
    CROWD_FROM,
    NUM_SLOTS,
    backends,
    dtypes,
    in_a_frame,
    moved,
    nan_in_fresh_memory,
    padded,
    run,
    some_steers,
    spoilt_but,
    steer,
    uses_of,
)
from lm_steer_cases import SPECIAL, bits, random_rows, steered, weights_of

from vllm_steer.kernels.lm_steer import Constant, Dense, LowRank, SteeredRows, SteerWeights

WIDTH = 33
ROWS = {"tiled": CROWD_FROM + 70, "rowwise": CROWD_FROM + 2}  # of one slot more than a tile has

layouts = pytest.mark.parametrize("layout", ["off", "all-6", "distinct", "zipf", "one-to-four"])
stores = pytest.mark.parametrize("stored", ["low-rank", "dense"])
widths = pytest.mark.parametrize("width", [17, 48], ids=["odd", "for-tensor-cores"])


@backends
@dtypes
@layouts
def test_rows_without_a_steer_are_unchanged_bit_for_bit(
    layout: str, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    x = random_rows(15, 17, dtype)
    for column, pattern in enumerate(SPECIAL[dtype]):
        bits(x)[1::2, column] = pattern
    x = in_a_frame(x.to(device))
    before = bits(x).clone()
    uses = [use for use in uses_of(layout, 15) if use[0] % 2 == 0]
    steers = some_steers(17, dtype, device)
    result = steer(backend, x, weights_of(steers, "both"), steers, uses)
    steered_rows = {row for row, _, _ in uses}
    other_rows = [row for row in range(15) if row not in steered_rows]
    assert torch.equal(bits(result)[other_rows], before[other_rows])
    assert torch.equal(bits(x), before), "the input was written to"
    assert result[sorted(steered_rows)].isfinite().all()


@backends
@dtypes
@stores
def test_a_row_has_the_same_bits_alone_and_in_any_batch(
    stored: str, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """Rows with one steer: alone the change is added directly, in a mixed batch it is summed."""
    num_rows, steers = ROWS[backend], some_steers(WIDTH, dtype, device)
    x, uses = random_rows(num_rows, WIDTH, dtype).to(device), uses_of("crowd", num_rows)
    weights = weights_of(steers, stored)
    together = steer(backend, x, weights, steers, uses)
    several = [row for row, _, _ in uses if row < CROWD_FROM]
    one_of_each = {slot: row for row, slot, _ in uses if several.count(row) == 1}
    assert len(one_of_each) >= 3
    for row in {*one_of_each.values(), 3, num_rows - 1}:
        alone = steer(backend, x[row : row + 1], weights, steers, moved(uses, {row: 0}))
        assert torch.equal(bits(alone[0]), bits(together[row]))


@backends
@dtypes
def test_a_row_with_one_steer_has_the_same_bits_beside_rows_with_several(
    dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """For every slot: a batch that adds changes directly, and a batch that stores and sums them."""
    steers = some_steers(17, dtype, device)
    weights, x = weights_of(steers, "both"), random_rows(NUM_SLOTS + 1, 17, dtype).to(device)
    uses = [(slot, slot, 1.5) for slot in range(NUM_SLOTS)]
    at_once = steer(backend, x, weights, steers, uses)
    several = [(NUM_SLOTS, slot, 1.0) for slot in (0, 1, 2, 7)]
    summed = steer(backend, x, weights, steers, uses + several)
    assert torch.equal(bits(at_once[:-1]), bits(summed[:-1]))
    assert not torch.equal(at_once[-1], summed[-1])


@backends
@dtypes
def test_permuted_rows_give_permuted_results_bit_for_bit(
    dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    num_rows, steers = ROWS[backend], some_steers(WIDTH, dtype, device)
    x, uses = random_rows(num_rows, WIDTH, dtype).to(device), uses_of("crowd", num_rows)
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(4))
    weights = weights_of(steers)
    first = steer(backend, x, weights, steers, uses)
    to = {int(old): new for new, old in enumerate(order)}
    second = steer(backend, x[order.to(device)], weights, steers, moved(uses, to))
    assert torch.equal(bits(first[order.to(device)]), bits(second))


@backends
@dtypes
def test_every_run_gives_the_same_bits(
    dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    steers = some_steers(WIDTH, dtype, device)
    weights, x = weights_of(steers, "both"), random_rows(5, WIDTH, dtype).to(device)
    uses = uses_of("one-to-four", 5)
    runs = [bits(steer(backend, x, weights, steers, uses)) for _ in range(3)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


@backends
@pytest.mark.parametrize("kinds", list(itertools.permutations("ldc")), ids="".join)
def test_steers_of_a_row_are_added_in_ascending_order_of_slot(
    kinds: tuple[str, ...], backend: str, device: torch.device
) -> None:
    """``((1 + 2^24) + 1) - 1`` is ``2^24 - 1`` in float32, and 2^24 in any other order.

    A slot that is low-rank, dense or constant adds its number to the second column.
    """
    adds = dict(zip(kinds, [2.0**24, 1.0, -1.0], strict=True))
    slots = {"l": LowRank(0, 1, 1, 1.0), "d": Dense(0, None, 1.0), "c": Constant(0, None, 1.0)}
    weights = SteerWeights(
        slots=tuple(slots[kind] for kind in kinds),
        shrink=torch.tensor([[1.0, 0.0]], device=device),
        expand=torch.tensor([[0.0, adds["l"]]], device=device),
        dense=torch.tensor([[[0.0, 0.0], [adds["d"], 0.0]]], device=device),
        vectors=torch.tensor([[0.0, adds["c"]]], device=device),
    )
    groups = tuple((slot, slot, slot + 1) for slot in range(3))
    rows = SteeredRows(np.zeros(3, np.int64), np.ones(3, np.float32), groups)
    result = run(backend, torch.ones(1, 2, device=device), weights, rows)
    assert result.tolist() == [[1.0, 2.0**24 - 1]]


@backends
@dtypes
@stores
@widths
def test_the_content_of_other_slots_does_not_change_a_row(
    width: int, stored: str, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """NaN in all weights except one slot's entries, and around every row of ``x``."""
    steers = some_steers(width, dtype, device)
    weights, x = weights_of(steers, stored), random_rows(2, width, dtype).to(device)
    for slot in range(NUM_SLOTS):
        uses = [(0, slot, 1.5)]
        expected = steer(backend, x, weights, steers, uses)
        result = steer(backend, in_a_frame(x), spoilt_but(weights, slot), steers, uses)
        assert expected.isfinite().all()
        assert torch.equal(bits(result), bits(expected))


@backends
@stores
def test_a_row_of_nan_does_not_change_other_rows(
    stored: str, backend: str, device: torch.device
) -> None:
    steers = some_steers(17, torch.float32, device)
    x, weights = random_rows(9, 17, torch.float32).to(device), weights_of(steers, stored)
    uses = [(row, slot, 1.0) for row in range(9) for slot in (1, 2, 3)[: 1 + row % 3]]
    clean = steer(backend, x, weights, steers, uses)
    x[4] = torch.nan
    result = steer(backend, x, weights, steers, uses)
    other_rows = [row for row in range(9) if row != 4]
    assert torch.equal(bits(result[other_rows]), bits(clean[other_rows]))
    assert result[4].isnan().all()


@backends
@dtypes
@pytest.mark.parametrize("layout", ["off", "all-2", "distinct", "one-to-four"])
@widths
def test_longer_tables_give_the_same_bits(
    width: int, layout: str, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """As in the buffers of a CUDA graph, with garbage in missing entries."""
    steers = some_steers(width, dtype, device)
    weights, x = weights_of(steers, "both"), random_rows(6, width, dtype).to(device)
    module, rows = BACKENDS[backend], steered(uses_of(layout, 6), steers)
    metadata = module.prepare(rows, weights, device)
    longer = padded(metadata, pairs=40, tiles=40, work=90, rows=12)
    with nan_in_fresh_memory(device):
        expected = module.steer_rows(x, weights, metadata)
        result = module.steer_rows(x, weights, longer)
    assert torch.equal(bits(result), bits(expected))


FENCE = 8192


@backends
@dtypes
@pytest.mark.parametrize("layout", ["distinct", "one-to-four"])
@widths
def test_nothing_is_written_or_read_outside_the_buffers(
    width: int, layout: str, dtype: torch.dtype, backend: str, device: torch.device, monkeypatch
) -> None:
    frames: list[tuple[torch.Tensor, int]] = []

    def fenced(*size: int | torch.Size, **options) -> torch.Tensor:
        shape = torch.Size(size[0] if isinstance(size[0], torch.Size) else size)
        frame = torch.full((shape.numel() + 2 * FENCE,), torch.nan, **options)
        frames.append((frame, shape.numel()))
        return frame[FENCE : FENCE + shape.numel()].view(shape)

    steers = some_steers(width, dtype, device)
    weights, x = weights_of(steers, "both"), random_rows(5, width, dtype).to(device)
    metadata = BACKENDS[backend].prepare(steered(uses_of(layout, 5), steers), weights, device)
    expected = BACKENDS[backend].steer_rows(x, weights, metadata)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", fenced)
        result = BACKENDS[backend].steer_rows(x, weights, metadata)
    assert torch.equal(bits(result), bits(expected))
    assert len(frames) >= 3
    for frame, size in frames:
        assert frame[:FENCE].isnan().all()
        assert frame[FENCE + size :].isnan().all()
