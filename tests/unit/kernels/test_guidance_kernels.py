"""Guidance on tensors: both backends against loops over Python floats."""

import math
from types import ModuleType

import pytest
import torch

from vllm_steer.kernels.guidance import Directions, TokenMap, reference, torch_gather

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYER, WIDTH, NUM_DIRECTIONS, NUM_LAYERS = 1, 5, 6, 3

backends = pytest.mark.parametrize("backend", [reference, torch_gather], ids=["reference", "torch"])


def generator(seed: int = 11) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_directions(rotations: str, seed: int = 5) -> Directions:
    """Tables with direction 0 zero; none, some or all of the others rotate."""
    vectors = torch.randn(NUM_LAYERS, NUM_DIRECTIONS, WIDTH, generator=generator(seed))
    vectors[:, 0] = 0
    turning = {"none": None, "some": torch.tensor([0.0, 1, 0, 0, 1, 0])}.get(
        rotations, torch.ones(6)
    )
    return Directions(vectors, turning)


def random_map(num_tokens: int, depth: int, seed: int = 7, extra_columns: int = 3) -> TokenMap:
    """A map with unsteered tokens, zero strengths at stale directions, and unused entries at the
    end.
    """
    size = (depth, num_tokens + extra_columns)
    directions = torch.randint(0, NUM_DIRECTIONS, size, generator=generator(seed))
    strengths = torch.randn(NUM_LAYERS, *size, generator=generator(seed + 1)) * 2
    strengths *= torch.rand(NUM_LAYERS, *size, generator=generator(seed + 2)) < 0.6
    strengths[:, directions == 0] = 0
    strengths[:, :, 3::4] = 0
    return TokenMap(directions.to(torch.int32), strengths)


def random_rows(num_tokens: int, dtype: torch.dtype, seed: int = 3) -> torch.Tensor:
    return (torch.randn(num_tokens, WIDTH, generator=generator(seed)) * 3).to(dtype)


def by_hand(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    directions: Directions,
    token_map: TokenMap,
    depth: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The steered rows in float64, and the largest number that each row's sums went through."""
    rows, sizes = [], []
    for token, row in enumerate(hidden.tolist()):
        residual_row = [0.0] * WIDTH if residual is None else residual[token].tolist()
        x = [a + b for a, b in zip(row, residual_row, strict=True)]
        moved, turning, size = list(x), False, max(map(abs, [*row, *residual_row]))
        for k in range(depth):
            strength = token_map.strengths[LAYER, k, token].item()
            direction = int(token_map.directions[k, token])
            vector = directions.vectors[LAYER, direction].tolist()
            size += abs(strength) * max(map(abs, vector))
            if strength:
                moved = [a + strength * b for a, b in zip(moved, vector, strict=True)]
                turning |= (
                    directions.is_rotation is not None and directions.is_rotation[direction] == 1
                )
        if turning:
            ratio = math.hypot(*x) / math.hypot(*moved)
            size += size * ratio
            moved = [a * ratio for a in moved]
        rows.append([a - b for a, b in zip(moved, residual_row, strict=True)])
        sizes.append([size])
    return (
        torch.tensor(rows, dtype=torch.float64).view(-1, WIDTH),
        torch.tensor(sizes, dtype=torch.float64).view(-1, 1),
    )


def untouched(token_map: TokenMap, depth: int, num_tokens: int) -> torch.Tensor:
    return (token_map.strengths[LAYER, :depth, :num_tokens] == 0).all(dim=0)


@backends
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("rotations", ["none", "some", "all"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_token_is_steered_as_by_hand(
    backend: ModuleType, dtype: torch.dtype, depth: int, rotations: str, with_residual: bool
) -> None:
    directions, token_map = random_directions(rotations), random_map(63, depth)
    hidden = random_rows(63, dtype)
    residual = random_rows(63, dtype, seed=4) if with_residual else None
    before, residual_copy = hidden.clone(), None if residual is None else residual.clone()
    expected, sizes = by_hand(hidden, residual, directions, token_map, depth)
    backend.steer_tokens_(hidden, residual, directions, LAYER, token_map, depth)
    assert hidden.dtype == dtype
    once = torch.finfo(dtype).eps * expected.abs() / 2 + torch.finfo(dtype).smallest_normal
    allowed = once + 8 * torch.finfo(torch.float32).eps * sizes
    assert ((hidden.double() - expected).abs() <= allowed).all()
    free = untouched(token_map, depth, 63)
    assert 0 < int(free.sum()) < 63
    assert torch.equal(hidden[free], before[free])
    assert residual is None or torch.equal(residual, residual_copy)


@backends
@pytest.mark.parametrize("num_tokens", [0, 1, 2])
@pytest.mark.parametrize("rotations", ["none", "some"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
def test_zero_tokens_and_one_token_are_steered(
    backend: ModuleType, num_tokens: int, rotations: str, with_residual: bool
) -> None:
    directions, token_map = random_directions(rotations), random_map(num_tokens, 2)
    token_map.strengths[:, 0, :num_tokens], token_map.directions[0] = 1.5, 4
    hidden = random_rows(num_tokens, torch.float32)
    residual = random_rows(num_tokens, torch.float32, seed=4) if with_residual else None
    expected, _ = by_hand(hidden, residual, directions, token_map, 2)
    backend.steer_tokens_(hidden, residual, directions, LAYER, token_map, 2)
    torch.testing.assert_close(hidden.double(), expected, rtol=1e-5, atol=1e-5)


@backends
def test_doses_beyond_the_depth_are_not_read(backend: ModuleType) -> None:
    directions, token_map = random_directions("some"), random_map(9, 4)
    hidden = random_rows(9, torch.float32)
    expected = hidden.clone()
    backend.steer_tokens_(hidden, None, directions, LAYER, token_map, 2)
    token_map.strengths[:, 2:], token_map.directions[2:] = math.nan, 3
    backend.steer_tokens_(expected, None, directions, LAYER, token_map, 2)
    assert torch.equal(hidden, expected)


@backends
@pytest.mark.parametrize("rotations", ["none", "some", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_without_a_dose_keeps_any_value(
    backend: ModuleType, dtype: torch.dtype, rotations: str
) -> None:
    """Also if its map has a direction, and next to steered tokens."""
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    special_values = [
        0.0,
        -0.0,
        math.inf,
        -math.inf,
        math.nan,
        largest,
        -largest,
        smallest,
        smallest / 4,
        1.0,
    ]
    hidden = torch.tensor(special_values, dtype=dtype).view(2, WIDTH).repeat(3, 1)
    residual = hidden.flip(0)
    before = hidden.clone()
    directions = torch.tensor([[4, 3, 1, 1, 2, 5]] * 2, dtype=torch.int32)
    strengths = torch.zeros(NUM_LAYERS, 2, 6)
    strengths[:, 0, 2] = 3.0
    backend.steer_tokens_(
        hidden, residual, random_directions(rotations), LAYER, TokenMap(directions, strengths), 2
    )
    keeps = [0, 1, 3, 4, 5]
    assert torch.equal(hidden[keeps].isnan(), before[keeps].isnan())
    assert torch.equal(hidden[keeps].nan_to_num(7), before[keeps].nan_to_num(7))


@backends
@pytest.mark.parametrize("strength", [0.0, 2.0])
def test_a_token_that_is_not_finite_does_not_change_others(
    backend: ModuleType, strength: float
) -> None:
    directions, token_map = random_directions("all"), random_map(5, 1)
    token_map.directions[:] = 2
    token_map.strengths[:] = strength
    hidden = random_rows(5, torch.float32)
    clean = hidden.clone()
    hidden[2] = math.nan
    backend.steer_tokens_(hidden, None, directions, LAYER, token_map, 1)
    backend.steer_tokens_(clean, None, directions, LAYER, token_map, 1)
    other_tokens = [0, 1, 3, 4]
    assert torch.equal(hidden[other_tokens], clean[other_tokens])


@backends
def test_a_zero_token_is_added_to_and_not_rotated(backend: ModuleType) -> None:
    directions = random_directions("some")  # direction 1 rotates, direction 2 adds
    token_map = TokenMap(
        torch.tensor([[1, 2, 1]], dtype=torch.int32), torch.full((NUM_LAYERS, 1, 3), 2.0)
    )
    hidden = torch.zeros(3, WIDTH)
    backend.steer_tokens_(hidden, None, directions, LAYER, token_map, 1)
    assert torch.equal(hidden[[0, 2]], torch.zeros(2, WIDTH))
    assert torch.equal(hidden[1], 2 * directions.vectors[LAYER, 2])


@backends
@pytest.mark.parametrize("size", [0.5, 1.0, 3.0, 4.0, 1e3, 3e4])
def test_a_rotation_that_cancels_a_token_exactly_gives_no_nan(
    backend: ModuleType, size: float
) -> None:
    vectors = torch.zeros(NUM_LAYERS, 2, WIDTH)
    vectors[:, 1, 3] = 1.0
    directions = Directions(vectors, torch.tensor([0.0, 1.0]))
    token_map = TokenMap(torch.ones(1, 1, dtype=torch.int32), torch.full((NUM_LAYERS, 1, 1), -size))
    hidden = vectors[LAYER, 1:2] * size
    backend.steer_tokens_(hidden, None, directions, LAYER, token_map, 1)
    assert torch.equal(hidden, torch.zeros(1, WIDTH))


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strength", [1e4, -1e4, 1e10, -1e18], ids=str)
def test_a_huge_rotation_ends_at_the_direction_with_the_tokens_norm(
    backend: ModuleType, dtype: torch.dtype, strength: float
) -> None:
    directions = random_directions("all")
    vectors = directions.vectors / directions.vectors.norm(dim=2, keepdim=True).clamp_min(1e-9)
    token_map = TokenMap(
        torch.full((1, 7), 4, dtype=torch.int32), torch.full((NUM_LAYERS, 1, 7), strength)
    )
    hidden = random_rows(7, dtype)
    norms = hidden.double().norm(dim=1, keepdim=True)
    expected = math.copysign(1, strength) * norms * vectors[LAYER, 4].double()
    backend.steer_tokens_(
        hidden, None, Directions(vectors, directions.is_rotation), LAYER, token_map, 1
    )
    step = 2 * torch.finfo(dtype).eps * float(norms.max()) + 50 / abs(strength)
    torch.testing.assert_close(hidden.double(), expected, rtol=0, atol=step)


@backends
@pytest.mark.parametrize("strength", [1e-45, 1e-38, 1e-9], ids=str)
@pytest.mark.parametrize("rotations", ["none", "all"])
def test_a_tiny_strength_changes_a_token_by_a_rounding_at_most(
    backend: ModuleType, rotations: str, strength: float
) -> None:
    token_map = TokenMap(
        torch.full((1, 7), 4, dtype=torch.int32), torch.full((NUM_LAYERS, 1, 7), strength)
    )
    hidden = random_rows(7, torch.float32)
    before = hidden.clone()
    backend.steer_tokens_(hidden, None, random_directions(rotations), LAYER, token_map, 1)
    torch.testing.assert_close(hidden, before, rtol=1e-6, atol=1e-8)


@backends
@pytest.mark.parametrize("rotations", ["none", "some", "all"])
def test_permuted_tokens_give_permuted_results(backend: ModuleType, rotations: str) -> None:
    directions, token_map = random_directions(rotations), random_map(63, 3, extra_columns=0)
    order = torch.randperm(63, generator=generator(1))
    permuted = TokenMap(token_map.directions[:, order], token_map.strengths[:, :, order])
    hidden, residual = random_rows(63, torch.bfloat16), random_rows(63, torch.bfloat16, seed=4)
    other = hidden[order]
    backend.steer_tokens_(hidden, residual, directions, LAYER, token_map, 3)
    backend.steer_tokens_(other, residual[order], directions, LAYER, permuted, 3)
    assert torch.equal(other, hidden[order])


@backends
@pytest.mark.parametrize("rotations", ["none", "some"])
def test_strided_rows_are_steered_in_place_and_nothing_around_them(
    backend: ModuleType, rotations: str
) -> None:
    directions, token_map = random_directions(rotations), random_map(9, 2)
    frame = torch.randn(18, 2 * WIDTH + 1, generator=generator())
    hidden, before = frame[::2, 1 : 2 * WIDTH : 2], frame.clone()
    residual = torch.randn(WIDTH, 9, generator=generator(2)).T
    expected = hidden.contiguous()
    backend.steer_tokens_(expected, residual.contiguous(), directions, LAYER, token_map, 2)
    backend.steer_tokens_(hidden, residual, directions, LAYER, token_map, 2)
    torch.testing.assert_close(hidden, expected, rtol=1e-6, atol=1e-6)
    hidden.copy_(before[::2, 1 : 2 * WIDTH : 2])
    assert torch.equal(frame, before)


def test_the_reported_sizes_of_maps_and_tables_are_their_bytes() -> None:
    assert random_map(10, 2, extra_columns=0).num_bytes == 2 * 10 * 4 + NUM_LAYERS * 2 * 10 * 4
    assert random_directions("all").num_bytes == NUM_LAYERS * NUM_DIRECTIONS * WIDTH * 4
