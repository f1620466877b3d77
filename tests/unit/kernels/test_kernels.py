"""The LM-Steer operation against the paper's formula, written out in ``lm_steer_cases``."""

import itertools
import math

import numpy as np
import pytest
import torch
from lm_steer_cases import (
    SPECIAL,
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

from vllm_steer.kernels.lm_steer import (
    LMSteerBackend,
    SteeredRows,
    SteerWeights,
    reference,
    torch_grouped,
)

BACKENDS: dict[str, LMSteerBackend] = {"reference": reference, "torch": torch_grouped}


def some_steers(width: int, dtype: torch.dtype = torch.float64) -> list[Weights]:
    """Mixed ranks and columns, with and without fixed ones, and two that only add."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    epsilon = 2.0 ** -math.ceil(math.log2(width))  # exact in float32, as epsilon x strength is
    kinds = [(1, 1, 0), (2, 5, 1), (3, 17, 2), (1, 64, 0)]
    steers = [
        Weights(normal(c, width, r), normal(c, width, r), fixed, epsilon) for c, r, fixed in kinds
    ]
    adding = [Weights(None, normal(1 + fixed, width, 1), fixed, 0.5) for fixed in (0, 1)]
    return [*steers[:2], adding[0], *steers[2:], adding[1]]


def run(backend: str, x: torch.Tensor, weights: SteerWeights, rows: SteeredRows) -> torch.Tensor:
    module = BACKENDS[backend]
    return module.steer_rows(x, weights, module.prepare(rows, weights, x.device))


def uses_of(layout: str, num_rows: int) -> list[Use]:
    """Which rows take which slots; strengths are exact in float32 and in bfloat16."""
    strengths = itertools.cycle([3.0, -1.5, 0.25, 5.0, -8.0])
    if layout == "all-off":
        return []
    if layout == "all-same":
        return [(row, 3, next(strengths)) for row in range(num_rows)]
    if layout == "all-distinct":
        return [(row, row % 6, next(strengths)) for row in range(num_rows)]
    if layout == "mixed":
        return [(row, (row * 7) % 6, next(strengths)) for row in range(0, num_rows, 3)]
    assert layout == "several-per-row"
    pairs = itertools.product(range(0, num_rows, 2), (0, 1, 2, 4))
    return [(row, slot, next(strengths)) for row, slot in pairs]


LAYOUTS = ["all-off", "all-same", "all-distinct", "mixed", "several-per-row"]
SHAPES = [(0, 63), (1, 63), (1, 500), (5, 64), (33, 500), (64, 63)]
SHAPE_IDS = [f"T{t}-d{d}" for t, d in SHAPES]


@pytest.mark.parametrize("stored", ["low-rank", "dense"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_the_reference_equals_the_papers_formula(
    shape: tuple[int, int], layout: str, stored: str
) -> None:
    x, steers, uses = random_rows(*shape), some_steers(shape[1]), uses_of(layout, shape[0])
    result = run("reference", x, weights_of(steers, stored), steered(uses, steers))
    torch.testing.assert_close(result, formula(x, steers, uses), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stored", ["low-rank", "dense"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_error_of_the_grouped_backend_is_within_float32(
    shape: tuple[int, int], layout: str, stored: str, dtype: torch.dtype
) -> None:
    x, steers = random_rows(*shape, dtype), some_steers(shape[1], dtype)
    uses = uses_of(layout, shape[0])
    result = run("torch", x, weights_of(steers, stored), steered(uses, steers))
    assert (result.dtype, result.shape) == (dtype, x.shape)
    assert relative_error(result, formula(x, steers, uses)) <= 1e-5


def plain_torch(x: torch.Tensor, steers: list[Weights], uses: list[Use]) -> torch.Tensor:
    """The direct implementation: every product and every sum in the model's dtype."""
    y = x.clone()
    for row, slot, strength in uses:
        steer = steers[slot]
        columns = steer.second.shape[0]
        for column in range(columns):
            a = 1.0 if column >= columns - steer.fixed else strength
            first = None if steer.first is None else steer.first[column]
            inner = torch.ones(1, dtype=x.dtype) if first is None else x[row] @ first
            y[row] = y[row] + steer.epsilon * ((a * inner) @ steer.second[column].T)
    return y


@pytest.mark.parametrize("stored", ["low-rank", "dense"])
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("shape", SHAPES[4:], ids=SHAPE_IDS[4:])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_half_precision_error_of_the_grouped_backend_is_at_most_twice_that_of_torch(
    shape: tuple[int, int], layout: str, stored: str, dtype: torch.dtype
) -> None:
    x, steers = random_rows(*shape, dtype), some_steers(shape[1], dtype)
    uses = uses_of(layout, shape[0])
    expected = formula(x, steers, uses)
    result = run("torch", x, weights_of(steers, stored), steered(uses, steers))
    allowed = 2 * relative_error(plain_torch(x, steers, uses), expected)
    assert relative_error(result, expected) <= allowed


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_float16_does_not_overflow_before_epsilon_makes_it_small(backend: str) -> None:
    width = 64
    x = torch.full((1, width), 4.0, dtype=torch.float16)
    first = torch.ones(1, width, 1, dtype=torch.float16)
    steers = [Weights(first, 80 * first, 0, 1e-3)]
    uses = [(0, 0, 5.0)]
    expected = formula(x, steers, uses)
    assert float(expected.max()) == pytest.approx(4 + 1e-3 * 5 * 256 * 80)
    result = run(backend, x, weights_of(steers), steered(uses, steers))
    assert relative_error(result, expected) <= 2e-3


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", list(SPECIAL), ids=str)
def test_rows_without_a_steer_are_unchanged_bit_for_bit(
    backend: str, layout: str, dtype: torch.dtype
) -> None:
    x = random_rows(25, 63, dtype)
    for column, pattern in enumerate(SPECIAL[dtype]):
        bits(x)[1::2, column] = pattern
    before = x.clone()
    uses = [use for use in uses_of(layout, 25) if use[0] % 2 == 0]
    steers = some_steers(63, dtype)
    result = run(backend, x, weights_of(steers), steered(uses, steers))
    unsteered = sorted(set(range(25)) - {row for row, _, _ in uses})
    assert torch.equal(bits(result)[unsteered], bits(before)[unsteered])
    assert torch.equal(bits(x), bits(before)), "the input was written to"


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_row_of_nan_does_not_change_other_rows(backend: str) -> None:
    x, steers = random_rows(4, 63, torch.float32), some_steers(63, torch.float32)
    x[1] = torch.nan
    uses = [(row, slot, 1.0) for row in range(4) for slot in (1, 2)]
    result = run(backend, x, weights_of(steers), steered(uses, steers))
    other_rows = [0, 2, 3]
    assert relative_error(result[other_rows], formula(x, steers, uses)[other_rows]) <= 1e-5
    assert result[1].isnan().all()


VIEWS = {
    "every-second-row": lambda wide: wide[::2],
    "columns-of-a-wider-tensor": lambda wide: wide[:, 5:68],
    "every-second-column": lambda wide: wide[:, ::2],
    "transposed": lambda wide: wide.T,
    "one-row-repeated": lambda wide: wide[:1].expand(9, -1),
}


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("view", list(VIEWS))
def test_a_strided_view_gives_what_its_contiguous_copy_gives(backend: str, view: str) -> None:
    x = VIEWS[view](random_rows(20, 126, torch.float32))
    steers = some_steers(x.shape[1], torch.float32)
    uses = uses_of("several-per-row", x.shape[0])
    result = run(backend, x, weights_of(steers), steered(uses, steers))
    assert relative_error(result, formula(x, steers, uses)) <= 1e-5


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_permuted_rows_give_permuted_results(backend: str) -> None:
    x, steers = random_rows(33, 63, torch.float32), some_steers(63, torch.float32)
    uses = uses_of("mixed", 33) + [(row, 5, 2.0) for row in range(0, 33, 5)]
    order = torch.randperm(33, generator=torch.Generator().manual_seed(4))
    moved_to = {int(old): new for new, old in enumerate(order)}
    moved = [(moved_to[row], slot, strength) for row, slot, strength in uses]
    weights = weights_of(steers)
    first = run(backend, x, weights, steered(uses, steers))[order]
    second = run(backend, x[order], weights, steered(moved, steers))
    off = sorted(set(range(33)) - {row for row, _, _ in moved})
    assert torch.equal(bits(first[off]), bits(second[off]))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_result_is_a_new_tensor_if_no_row_is_steered(backend: str) -> None:
    x = random_rows(3, 63, torch.float32)
    result = run(backend, x, weights_of(some_steers(63, torch.float32)), steered([], []))
    assert torch.equal(result, x)
    assert result.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_same_steer_twice_on_a_row_counts_twice(backend: str) -> None:
    x, steers = random_rows(2, 63, torch.float32), some_steers(63, torch.float32)
    uses = [(1, 3, 1.0), (1, 3, 2.0)]
    result = run(backend, x, weights_of(steers), steered(uses, steers))
    assert relative_error(result, formula(x, steers, uses)) <= 1e-5


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("stored", ["low-rank", "dense"])
@pytest.mark.parametrize("dtype", list(SPECIAL), ids=str)
def test_a_steer_at_strength_zero_leaves_out_its_fixed_columns_too(
    backend: str, stored: str, dtype: torch.dtype
) -> None:
    """Rows under one such steer and under all, beside rows of the same steers at other strengths;
    rows that are not finite too."""
    x, steers = random_rows(18, 63, dtype), some_steers(63, dtype)
    x[6, 3], x[7, 5], x[8] = torch.inf, -torch.inf, torch.nan
    off = [(row, row % 6, 0.0) for row in range(9)] + [(8, slot, 0.0) for slot in range(6)]
    on = [(row, row % 6, 2.0) for row in range(9, 18)]
    result = run(backend, x, weights_of(steers, stored), steered(off + on, steers))
    torch.testing.assert_close(result[:9], x[:9], rtol=0, atol=0, equal_nan=True)
    alone = run(backend, x, weights_of(steers, stored), steered(on, steers))
    torch.testing.assert_close(result[9:], alone[9:], rtol=1e-5, atol=1e-5)
    assert (result[9:] != x[9:]).any(dim=1).all()


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("stored", ["low-rank", "dense"])
def test_steers_at_strength_zero_are_left_out_of_a_row_with_several(
    backend: str, stored: str
) -> None:
    x, steers = random_rows(6, 63, torch.float32), some_steers(63, torch.float32)
    uses = [(row, slot, float(3 * ((row + slot) % 2))) for row in range(6) for slot in range(6)]
    result = run(backend, x, weights_of(steers, stored), steered(uses, steers))
    nonzero_uses = [use for use in uses if use[2] != 0]
    assert relative_error(result, formula(x, steers, nonzero_uses)) <= 1e-5


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_the_scales_of_the_metadata_may_be_overwritten_between_calls(
    backend: str, layout: str
) -> None:
    """They are those of the pairs, in order, in separate memory."""
    x, steers, module = random_rows(9, 63), some_steers(63), BACKENDS[backend]
    weights, uses = weights_of(steers), uses_of(layout, 9)
    pairs = steered(uses, steers)
    original = pairs.scales.copy()
    metadata = module.prepare(pairs, weights, x.device)
    assert (metadata.scales.dtype, metadata.scales.tolist()) == (torch.float32, original.tolist())
    for strengths in ([0.5, 0.0, -2.0], [0.0], [4.0, 1.5]):
        now = at_strengths(uses, strengths)
        metadata.scales.copy_(torch.from_numpy(steered(now, steers).scales))
        result = module.steer_rows(x, weights, metadata)
        assert relative_error(result, formula(x, steers, now)) <= 1e-5
    assert np.array_equal(pairs.scales, original), "the caller's scales were written to"


def test_the_tables_report_their_size() -> None:
    steers = some_steers(10, torch.float32)
    assert weights_of(steers).num_bytes == 4 * 10 * (2 * (1 * 1 + 2 * 5 + 3 * 17 + 64) + 1 + 2)
    assert weights_of(steers, "dense").num_bytes == 4 * 10 * (10 * (1 + 2 + 2 + 1) + 1 + 2)
