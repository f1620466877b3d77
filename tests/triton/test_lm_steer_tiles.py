"""LM-Steer over tiles in the blocks of 16-bit weights that tensor cores take, 64 by 64.

For any other rows of a tile, both places of the reduction, and all block sizes of a benchmark.
"""

from dataclasses import replace

import pytest
import torch
from lm_steer import nan_in_fresh_memory, some_steers, uses_of
from lm_steer_cases import (
    Use,
    Weights,
    bits,
    formula,
    random_rows,
    relative_error,
    steered,
    weights_of,
)

from vllm_steer.kernels.lm_steer import SteerWeights, torch_grouped
from vllm_steer.kernels.lm_steer.triton_backend import TritonBackend
from vllm_steer.kernels.lm_steer.triton_tiled import TILED, tiled

halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def steer(
    backend: TritonBackend,
    x: torch.Tensor,
    weights: SteerWeights,
    steers: list[Weights],
    uses: list[Use],
) -> torch.Tensor:
    metadata = backend.prepare(steered(uses, steers), weights, x.device)
    with nan_in_fresh_memory(x.device):
        return backend.steer_rows(x, weights, metadata)


@halves
@pytest.mark.parametrize("slot", [5, 6, 1], ids=["rank-64", "rank-128-fixed", "dense-fixed"])
def test_a_row_has_the_same_bits_for_any_tile_size_and_position(
    slot: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Alone, first and last, of tiles that are full, half full and nearly empty."""
    width = 64
    steers = some_steers(width, dtype, device)
    weights, x = weights_of(steers, "both"), random_rows(70, width, dtype).to(device)
    if slot == 6:
        weights = weights_of(steers, "low-rank")
    alone = steer(TILED, x[:1], weights, steers, [(0, slot, 1.5)])
    assert not torch.equal(alone[0], x[0])
    full = TILED.sizes(weights).rows
    for rows in (2, full // 2, full, full + 1, 70):
        for place in {0, rows - 1}:
            batch = x[1 : rows + 1].clone() if rows < 70 else x.clone()
            batch[place] = x[0]
            uses = [(row, slot, 1.5 if row == place else -3.0) for row in range(rows)]
            result = steer(TILED, batch, weights, steers, uses)
            assert torch.equal(bits(result[place]), bits(alone[0])), (rows, place)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["all-6", "one-to-four"])
def test_split_k_reduction_inside_or_before_expand_gives_the_same_bits(
    layout: str, dtype: torch.dtype, device: torch.device
) -> None:
    steers = some_steers(240, dtype, device)
    weights, uses = weights_of(steers), uses_of(layout, 9)
    x = random_rows(9, 240, dtype).to(device)
    sizes = TILED.sizes(weights)
    assert sizes.expand_folds and sizes.chunks > 1
    without_folds = replace(TILED, sizes=lambda weights: replace(sizes, expand_folds=False))
    result, expected = (
        steer(backend, x, weights, steers, uses) for backend in (TILED, without_folds)
    )
    assert torch.equal(bits(result), bits(expected))
    assert not torch.equal(result, x)


@pytest.mark.parametrize("stored", ["low-rank", "dense"])
@pytest.mark.parametrize(
    "varied",
    [
        {},
        {"rows": 16},
        {"rows": 64},
        {"columns": 16},
        {"few_chunks": 2},
        {"few_chunks": 0},
        {"few_chunks": 0, "columns": 64, "rows": 16},
    ],
    ids=str,
)
def test_the_block_sizes_of_a_benchmark_follow_the_papers_formula(
    varied: dict[str, int], stored: str, device: torch.device
) -> None:
    """Expand with its own folding and without, in one part and in four; rows of several steers."""
    width, num_rows = 208, 18
    steers = some_steers(width, torch.bfloat16, device)
    weights, x = weights_of(steers, stored), random_rows(num_rows, width, torch.bfloat16).to(device)
    uses = uses_of("one-to-four", 2) + [(row, 6, 0.5 * row) for row in range(2, num_rows)]
    result = steer(tiled(**varied), x, weights, steers, uses)
    plain = torch_grouped.steer_rows(
        x, weights, torch_grouped.prepare(steered(uses, steers), weights, device)
    )
    expected = formula(x, steers, uses)
    assert relative_error(result, expected) <= 2 * relative_error(plain, expected)


def test_ranks_of_several_blocks_are_expanded_in_parts(device: torch.device) -> None:
    """Each part has its own blocks of ranks, the last of them has none or half of one."""
    width, generator = 32, torch.Generator().manual_seed(2)
    for rank in (200, 290, 600):
        first, second = (
            torch.randn(1, width, rank, generator=generator).to(device, torch.bfloat16)
            for _ in range(2)
        )
        steers = [Weights(first, second, 0, 2.0**-7)]
        weights, x = weights_of(steers), random_rows(3, width, torch.bfloat16).to(device)
        sizes = TILED.sizes(weights)
        assert sizes.expand_parts == 4 and not sizes.expand_folds
        uses = [(0, 0, 1.0), (2, 0, -2.0)]
        result, expected = steer(TILED, x, weights, steers, uses), formula(x, steers, uses)
        plain = torch_grouped.steer_rows(
            x, weights, torch_grouped.prepare(steered(uses, steers), weights, device)
        )
        assert relative_error(result, expected) <= 2 * relative_error(plain, expected)
        assert torch.equal(bits(result[1]), bits(x[1]))


def test_a_row_that_is_not_finite_does_not_change_its_tile(device: torch.device) -> None:
    """Nor itself at strength 0: of products in parts most squares mean nothing."""
    width = 64
    steers = some_steers(width, torch.bfloat16, device)
    x = random_rows(6, width, torch.bfloat16).to(device)
    spoilt = x.clone()
    spoilt[1], spoilt[3, 5], spoilt[4, 0] = torch.nan, torch.inf, torch.nan
    for backend in (TILED, tiled(few_chunks=0)):
        for stored in ("low-rank", "dense"):
            weights = weights_of(steers, stored)
            uses = [(row, 6, 0.0 if row == 4 else 2.0) for row in range(6)]
            expected = steer(backend, x, weights, steers, uses)
            result = steer(backend, spoilt, weights, steers, uses)
            assert torch.equal(bits(result)[[0, 2, 5]], bits(expected)[[0, 2, 5]])
            assert torch.equal(bits(result)[4], bits(spoilt)[4])
