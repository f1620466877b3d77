"""The error of LM-Steer's Triton backends against the paper's formula in float64.

float32 within ``FLOAT32`` of it by norm, 16 bits within twice the error of the torch backend.
"""

import numpy as np
import pytest
import torch
from lm_steer import (
    BACKENDS,
    DTYPES,
    NUM_SLOTS,
    backends,
    dtypes,
    in_a_frame,
    nan_in_fresh_memory,
    some_steers,
    steer,
    uses_of,
)
from lm_steer_cases import (
    Use,
    Weights,
    at_strengths,
    bits,
    formula,
    random_rows,
    relative_error,
    steered,
    weights_of,
)

from vllm_steer.kernels.lm_steer import SteerWeights, torch_grouped

FLOAT32 = 2e-7
UNIT_ROUNDOFF = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}

CASES = {  # width, rows by tile, rows by row, layout, how steers that multiply are stored
    "d1": (1, 33, 5, "one-to-four", "both"),
    "d17": (17, 5, 5, "one-to-four", "both"),
    "d63-zipf": (63, 33, 9, "zipf", "both"),
    "d63-dense": (63, 5, 2, "one-to-four", "dense"),
    "d64-same": (64, 70, 2, "all-5", "low-rank"),
    "d64-same-fixed": (64, 66, 2, "all-6", "low-rank"),
    "d64-same-dense-fixed": (64, 66, 2, "all-1", "both"),
    "d320-distinct": (320, 9, 9, "distinct", "low-rank"),
    "d320-same": (320, 70, 1, "all-6", "low-rank"),
    "d320-dense": (320, 2, 1, "all-1", "both"),
    "d1100-several-chunks": (1100, 2, 2, "all-1", "low-rank"),
}


def grouped_error(
    x: torch.Tensor, weights: SteerWeights, steers: list[Weights], uses: list[Use]
) -> float:
    """The error of plain torch."""
    rows = torch_grouped.prepare(steered(uses, steers), weights, x.device)
    return relative_error(torch_grouped.steer_rows(x, weights, rows), formula(x, steers, uses))


def assert_close_to_the_formula(
    backend: str, x: torch.Tensor, weights: SteerWeights, steers: list[Weights], uses: list[Use]
) -> None:
    before = bits(x).clone()
    result = steer(backend, x, weights, steers, uses)
    assert (result.dtype, result.shape, result.is_contiguous()) == (x.dtype, x.shape, True)
    assert torch.equal(bits(x), before), "the input was written to"
    error = relative_error(result, formula(x, steers, uses))
    exact = x.dtype == weights.dtype == torch.float32
    assert error <= (FLOAT32 if exact else 2 * grouped_error(x, weights, steers, uses))


@backends
@dtypes
@pytest.mark.parametrize("case", list(CASES))
def test_every_row_is_steered_by_the_papers_formula(
    case: str, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    width, by_tile, by_row, layout, stored = CASES[case]
    num_rows = by_tile if backend == "tiled" else by_row
    steers = some_steers(width, dtype, device)
    x = in_a_frame(random_rows(num_rows, width, dtype).to(device))
    uses = uses_of(layout, num_rows)
    assert_close_to_the_formula(backend, x, weights_of(steers, stored), steers, uses)


@backends
@dtypes
@pytest.mark.parametrize("num_rows", [0, 1, 5])
def test_a_batch_without_steers_is_copied(
    num_rows: int, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    steers = some_steers(17, dtype, device)
    x = random_rows(num_rows, 17, dtype).to(device)
    result = steer(backend, x, weights_of(steers), steers, [])
    assert torch.equal(bits(result), bits(x))
    assert result.dtype == dtype
    assert not num_rows or result.data_ptr() != x.data_ptr()


@backends
def test_wide_rows_and_ranks_of_several_blocks_are_steered(
    backend: str, device: torch.device
) -> None:
    """Blocks of the widest rows, and of a rank above any block's."""
    for width, rank, dtype in ((4100, 3, torch.bfloat16), (17, 300, torch.float32)):
        first = random_rows(width, rank, dtype).to(device)[None]
        steers = [Weights(first, first.flip(1), 0, 2.0**-8)]
        x, uses = random_rows(1, width, dtype).to(device), [(0, 0, 1.5)]
        assert_close_to_the_formula(backend, x, weights_of(steers), steers, uses)


@backends
def test_a_bank_of_constants_alone_adds_them(backend: str, device: torch.device) -> None:
    """Columns beyond the first block, and a bank without ranks or matrices."""
    vector = random_rows(2, 1100, torch.float32).to(device)[:, :, None]
    steers = [Weights(None, vector, 1, 0.5), Weights(None, vector[:1], 0, 0.25)]
    x = random_rows(3, 1100, torch.float32).to(device)
    for uses in ([(0, 0, 3.0), (2, 1, 1.0)], [(0, 0, 3.0), (0, 1, 1.0)]):
        assert_close_to_the_formula(backend, x, weights_of(steers), steers, uses)


@backends
@pytest.mark.parametrize("stored", ["low-rank", "dense"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_results_are_rounded_once(
    dtype: torch.dtype, stored: str, backend: str, device: torch.device
) -> None:
    """No sum and no change is in 16 bits on its way, whether a row has one steer or three.

    But what is between the factors of a low rank: over tiles it is rounded to 16 bits too, after
    it is scaled. The first factors are identities, so it is known, and weights hold the formula's
    own numbers in either backend.
    """
    width = 17
    matrix = random_rows(2 * width, 2 * width, dtype).to(device)[None]
    eye = torch.eye(width, dtype=dtype, device=device)[None]
    steers = [
        Weights(eye, matrix[:, :width, :width], 0, 0.5),
        Weights(eye.expand(2, -1, -1), matrix[0].view(2, width, -1)[:, :, :width], 1, 0.25),
        Weights(None, matrix[0, :2, :width, None], 1, 0.5),
    ]
    x = random_rows(4, width, dtype).to(device)
    uses = [(0, 0, 3.0), (1, 1, -1.5), (2, 2, 0.75), (3, 0, 1.25), (3, 1, 2.0), (3, 2, 5.0)]
    for chosen in (uses[:3], uses):
        result = steer(backend, x, weights_of(steers, stored), steers, chosen)
        expected = formula(x, steers, chosen)
        if backend == "tiled" and stored == "low-rank":
            expected += lost_between_the_factors(x, steers, chosen)
        rounding = UNIT_ROUNDOFF[dtype] * expected.abs()
        slack = 1e-6 * expected.abs().amax(dim=1, keepdim=True)
        assert ((result.double() - expected).abs() <= rounding + slack).all()


def lost_between_the_factors(
    x: torch.Tensor, steers: list[Weights], uses: list[Use]
) -> torch.Tensor:
    """What rounding ``epsilon a x`` to the dtype of ``x`` does to each row (``P1`` is identity)."""
    lost = torch.zeros_like(x, dtype=torch.float64)
    for row, slot, strength in uses:
        steer = steers[slot]
        if steer.first is None:
            continue
        for a, second in zip([strength, 1.0], steer.second, strict=False):
            inner = x[row].double() * (steer.epsilon * a)
            lost[row] += second.double() @ (inner.to(x.dtype).double() - inner)
    return lost


def test_the_tiled_backend_rounds_rows_to_the_dtype_of_the_tables(
    device: torch.device,
) -> None:
    """0.75 of the way from 1 to the next bfloat16, and half of it, where the even one is nearest.

    The row itself, to which the change is added, is not rounded.
    """
    x = torch.tensor([[1 + 0.75 * 2**-7, 1 + 0.5 * 2**-7, 1 + 1.5 * 2**-7]], device=device)
    eye = torch.eye(3, dtype=torch.bfloat16, device=device)[None]
    steers = [Weights(eye, eye, 0, 1.0)]
    nearest = torch.tensor([[1 + 2**-7, 1.0, 1 + 2 * 2**-7]], device=device)
    for stored in ("low-rank", "dense"):
        result = steer("tiled", x, weights_of(steers, stored), steers, [(0, 0, 1.0)])
        assert torch.equal(result, x + nearest)


@backends
@pytest.mark.parametrize("stored", ["low-rank", "dense"])
def test_products_of_16_bits_are_exact_where_float32_is(
    stored: str, backend: str, device: torch.device
) -> None:
    """Small integers: every number on the way is one of them, so nothing may round."""
    width, rank = 63, 5
    generator = torch.Generator().manual_seed(4)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-1, 2, shape, generator=generator).to(device, torch.bfloat16)

    steers = [Weights(integers(2, width, rank), integers(2, width, rank), 1, 1.0)]
    x, uses = integers(3, width), [(0, 0, 2.0), (2, 0, -1.0)]
    result = steer(backend, x, weights_of(steers, stored), steers, uses)
    assert torch.equal(result, formula(x, steers, uses).to(torch.bfloat16))


VIEWS = {
    "every-second-row": lambda wide: wide[::2],
    "columns-of-a-wider-tensor": lambda wide: wide[:, 5:22],
    "every-second-column": lambda wide: wide[:, 1::2],
    "transposed": lambda wide: wide.T,
    "one-row-repeated": lambda wide: wide[:1].expand(9, -1),
    "one-column-repeated": lambda wide: wide[:, :1].expand(-1, 17),
    "begins-anywhere": lambda wide: wide[1:, 1:18],
}


@backends
@pytest.mark.parametrize("layout", ["distinct", "one-to-four"])
@pytest.mark.parametrize("view", list(VIEWS))
def test_a_strided_view_gives_what_its_contiguous_copy_gives(
    view: str, layout: str, backend: str, device: torch.device
) -> None:
    x = VIEWS[view](random_rows(10, 34, torch.bfloat16).to(device))
    steers = some_steers(x.shape[1], x.dtype, device)
    uses, weights = uses_of(layout, 5), weights_of(steers, "both")
    copy = x.clone(memory_format=torch.contiguous_format)
    result, expected = (steer(backend, rows, weights, steers, uses) for rows in (x, copy))
    assert torch.equal(bits(result), bits(expected))
    assert torch.equal(bits(x), bits(copy)), "the input was written to"
    assert relative_error(result, formula(copy, steers, uses)) <= 0.01


@backends
@pytest.mark.parametrize("stored", DTYPES, ids=lambda dtype: f"weights-{dtype}")
@dtypes
def test_rows_may_be_in_another_dtype_than_the_tables(
    dtype: torch.dtype, stored: torch.dtype, backend: str, device: torch.device
) -> None:
    steers = some_steers(33, stored, device)
    x, uses = random_rows(5, 33, dtype).to(device), uses_of("one-to-four", 5)
    assert_close_to_the_formula(backend, x, weights_of(steers, "both"), steers, uses)


@backends
def test_the_same_steer_twice_on_a_row_counts_twice(backend: str, device: torch.device) -> None:
    steers = some_steers(17, torch.float32, device)
    x = random_rows(2, 17, torch.float32).to(device)
    uses = [(1, slot, strength) for slot in (1, 2, 3) for strength in (1.0, 2.0)]
    assert_close_to_the_formula(backend, x, weights_of(steers, "both"), steers, uses)


@backends
@pytest.mark.parametrize("stored", ["low-rank", "dense"])
def test_float16_does_not_overflow_before_epsilon_makes_it_small(
    stored: str, backend: str, device: torch.device
) -> None:
    """``x P1`` is 96000 and ``x P1 P2^T`` more, beyond float16; their product with epsilon is not.

    Dense, the product ``P1 P2^T`` has to be a float16 itself.
    """
    width = 320
    x = torch.full((2, width), 300.0, dtype=torch.float16, device=device)
    first = torch.ones(2, width, 1, dtype=torch.float16, device=device)
    steers = [Weights(first, 20 * first, 1, 2.0**-10)]
    uses = [(0, 0, 5.0), (1, 0, 5.0)]
    expected = formula(x, steers, uses)
    assert expected.max() == 300 + 2.0**-10 * 6 * 96000 * 20
    result = steer(backend, x, weights_of(steers, stored), steers, uses)
    assert relative_error(result, expected) <= 1e-3


@backends
def test_tiny_float16_numbers_are_not_lost_between_the_factors(
    backend: str, device: torch.device
) -> None:
    """``epsilon x P1`` of 2^-13 is still a normal float16."""
    x = torch.full((1, 64), 2.0**-10, dtype=torch.float16, device=device)
    first = torch.full((1, 64, 1), 2.0**-3, dtype=torch.float16, device=device)
    steers = [Weights(first, torch.full_like(first, 80.0), 0, 2.0**-6)]
    result = steer(backend, x, weights_of(steers), steers, [(0, 0, 1.0)])
    assert relative_error(result, formula(x, steers, [(0, 0, 1.0)])) <= 1e-3


@backends
@dtypes
@pytest.mark.parametrize("stored", ["low-rank", "dense"])
def test_a_steer_at_strength_zero_leaves_out_its_fixed_columns_too(
    stored: str, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """Beside rows of the same steers at another strength, whose bits are as without these; rows
    that are not finite too, and a row under several steers."""
    steers = some_steers(33, dtype, device)
    weights, x = weights_of(steers, stored), random_rows(2 * NUM_SLOTS, 33, dtype).to(device)
    x[0, 3], x[1, 5], x[2] = torch.inf, -torch.inf, torch.nan
    on = [(NUM_SLOTS + slot, slot, 2.0) for slot in range(NUM_SLOTS)]
    off = [(slot, slot, 0.0) for slot in range(NUM_SLOTS)]
    alone = steer(backend, x, weights, steers, on)
    for zero_uses in (off, off + [(1, slot, 0.0) for slot in (2, 4, 6, 7)]):
        result = steer(backend, x, weights, steers, on + zero_uses)
        torch.testing.assert_close(
            result[:NUM_SLOTS], x[:NUM_SLOTS], rtol=0, atol=0, equal_nan=True
        )
        assert torch.equal(bits(result[NUM_SLOTS:]), bits(alone[NUM_SLOTS:]))


@backends
@pytest.mark.parametrize("stored", ["low-rank", "dense"])
def test_steers_at_strength_zero_are_left_out_of_a_row_with_several(
    stored: str, backend: str, device: torch.device
) -> None:
    steers = some_steers(17, torch.float32, device)
    x = random_rows(4, 17, torch.float32).to(device)
    uses = [(row, slot, 3.0 * ((row + slot) % 2)) for row in range(4) for slot in range(NUM_SLOTS)]
    result = steer(backend, x, weights_of(steers, stored), steers, uses)
    nonzero_uses = [use for use in uses if use[2] != 0]
    assert relative_error(result, formula(x, steers, nonzero_uses)) <= FLOAT32


@backends
@pytest.mark.parametrize("layout", ["all-6", "distinct", "one-to-four"])
def test_the_scales_of_the_metadata_may_be_overwritten_between_calls(
    layout: str, backend: str, device: torch.device
) -> None:
    """They are those of the pairs, in order, in separate memory."""
    steers, module = some_steers(33, torch.float32, device), BACKENDS[backend]
    weights, uses = weights_of(steers, "both"), uses_of(layout, 9)
    x, pairs = random_rows(9, 33, torch.float32).to(device), steered(uses, steers)
    original = pairs.scales.copy()
    metadata = module.prepare(pairs, weights, device)
    assert (metadata.scales.dtype, metadata.scales.tolist()) == (torch.float32, original.tolist())
    for strengths in ([0.5, 0.0, -2.0], [0.0], [4.0, 1.5]):
        now = at_strengths(uses, strengths)
        metadata.scales.copy_(torch.from_numpy(steered(now, steers).scales))
        with nan_in_fresh_memory(device):
            result = module.steer_rows(x, weights, metadata)
        assert relative_error(result, formula(x, steers, now)) <= FLOAT32
        assert torch.equal(bits(result), bits(steer(backend, x, weights, steers, now)))
    assert np.array_equal(pairs.scales, original), "the caller's scales were written to"
