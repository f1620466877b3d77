"""The triton_fused backend against the equations of ``reference`` in float64."""

import math
import subprocess
import sys

import pytest
import torch

from vllm_steer.kernels.guidance import Directions, TokenMap, reference, torch_gather, triton_fused

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYER, NUM_LAYERS, NUM_DIRECTIONS = 1, 3, 6
TWO_BLOCKS = triton_fused.ROTATE_BLOCK + 5

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
sites = pytest.mark.parametrize("rotations", ["none", "some", "all"])
residuals = pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_directions(
    rotations: str, width: int, device: torch.device, seed: int = 5
) -> Directions:
    """Unit vectors with direction 0 zero; none, some or all of the others rotate."""
    vectors = torch.randn(NUM_LAYERS, NUM_DIRECTIONS, width, generator=generator(seed))
    vectors /= vectors.norm(dim=2, keepdim=True).clamp_min(1e-6)
    vectors[:, 0] = 0
    turning = [0.0, 1, 0, 0, 1, 0] if rotations == "some" else [0.0, 1, 1, 1, 1, 1]
    is_rotation = None if rotations == "none" else torch.tensor(turning, device=device)
    return Directions(vectors.to(device), is_rotation)


def random_map(
    num_tokens: int, depth: int, device: torch.device, doses: str = "mixed", extra_columns: int = 3
) -> TokenMap:
    """``doses``: all tokens have none, the same, or their own doses, or only some tokens have
    doses.
    """
    size = (depth, num_tokens + extra_columns)
    direction_rows = torch.randint(1, NUM_DIRECTIONS, size, generator=generator(7))
    strengths = torch.randn(NUM_LAYERS, *size, generator=generator(8)) * 4
    if doses == "off":
        strengths[:] = 0
    if doses == "same":
        direction_rows[:], strengths[:] = direction_rows[:, :1], strengths[:, :, :1]
    if doses == "mixed":
        strengths *= torch.rand(NUM_LAYERS, *size, generator=generator(9)) < 0.6
        strengths[:, :, 2::4] = 0
    return TokenMap(direction_rows.to(device, torch.int32), strengths.to(device))


def random_rows(
    num_tokens: int, width: int, dtype: torch.dtype, device: torch.device, seed: int = 3
) -> torch.Tensor:
    rows = torch.randn(num_tokens, width, generator=generator(seed)) * 3
    return rows.to(device, dtype)


def written_out(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    directions: Directions,
    token_map: TokenMap,
    depth: int,
    layer: int = LAYER,
) -> torch.Tensor:
    """The steered rows in float64, not rounded to the dtype of ``hidden``."""
    rows = hidden.double()
    reference.steer_tokens_(rows, residual, directions, layer, token_map, depth)
    return rows


def scale_of(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    directions: Directions,
    token_map: TokenMap,
    depth: int,
) -> torch.Tensor:
    """Per row ``[T, 1]``: the largest number of each summand, added up."""
    num_tokens = hidden.shape[0]
    strengths = token_map.strengths[LAYER, :depth, :num_tokens].abs()
    largest = directions.vectors[LAYER].abs().amax(dim=1)
    size = hidden.abs().amax(dim=1).double()
    size += (strengths * largest[token_map.directions[:depth, :num_tokens]]).sum(dim=0)
    if residual is not None:
        size += residual.abs().amax(dim=1)
    return size[:, None]


def assert_close_to_float64(
    steered: torch.Tensor,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    directions: Directions,
    token_map: TokenMap,
    depth: int,
) -> None:
    """float32 within 2e-7 of the row's scale; 16 bits within twice torch's own error."""
    expected = written_out(hidden, residual, directions, token_map, depth)
    error = (steered.double() - expected).abs()
    if hidden.dtype == torch.float32:
        scale = scale_of(hidden, residual, directions, token_map, depth)
        assert (error <= 2e-7 * scale).all(), (error / scale).max()
        return
    plain = hidden.clone()
    torch_gather.steer_tokens_(plain, residual, directions, LAYER, token_map, depth)
    assert error.max() <= 2 * (plain.double() - expected).abs().max()


@dtypes
@sites
@residuals
@pytest.mark.parametrize("width", [1, 63, 64, 320])
def test_every_token_equals_the_float64_calculation(
    width: int, with_residual: bool, rotations: str, dtype: torch.dtype, device: torch.device
) -> None:
    directions, token_map = random_directions(rotations, width, device), random_map(7, 3, device)
    hidden = random_rows(7, width, dtype, device)
    residual = random_rows(7, width, dtype, device, seed=4) if with_residual else None
    steered, residual_copy = hidden.clone(), None if residual is None else residual.clone()
    triton_fused.steer_tokens_(steered, residual, directions, LAYER, token_map, 3)
    assert_close_to_float64(steered, hidden, residual, directions, token_map, 3)
    free = (token_map.strengths[LAYER, :, :7] == 0).all(dim=0)
    assert 0 < int(free.sum()) < 7
    assert torch.equal(steered[free], hidden[free])
    assert residual is None or torch.equal(residual, residual_copy)


@dtypes
@sites
@residuals
def test_a_row_wider_than_a_block_is_steered_as_a_whole(
    with_residual: bool, rotations: str, dtype: torch.dtype, device: torch.device
) -> None:
    directions, token_map = (
        random_directions(rotations, TWO_BLOCKS, device),
        random_map(4, 2, device),
    )
    hidden = random_rows(4, TWO_BLOCKS, dtype, device)
    residual = random_rows(4, TWO_BLOCKS, dtype, device, seed=4) if with_residual else None
    steered = hidden.clone()
    triton_fused.steer_tokens_(steered, residual, directions, LAYER, token_map, 2)
    assert_close_to_float64(steered, hidden, residual, directions, token_map, 2)


@sites
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 33])
def test_any_number_of_tokens_is_steered(
    num_tokens: int, rotations: str, device: torch.device
) -> None:
    directions, token_map = (
        random_directions(rotations, 24, device),
        random_map(num_tokens, 2, device),
    )
    hidden = random_rows(num_tokens, 24, torch.bfloat16, device)
    steered = hidden.clone()
    triton_fused.steer_tokens_(steered, None, directions, LAYER, token_map, 2)
    if num_tokens:
        assert_close_to_float64(steered, hidden, None, directions, token_map, 2)


@sites
@pytest.mark.parametrize("doses", ["off", "same", "distinct", "mixed"])
def test_a_batch_may_mix_any_doses(doses: str, rotations: str, device: torch.device) -> None:
    directions, token_map = (
        random_directions(rotations, 40, device),
        random_map(9, 2, device, doses),
    )
    hidden = random_rows(9, 40, torch.float32, device)
    residual = random_rows(9, 40, torch.float32, device, seed=4)
    steered = hidden.clone()
    triton_fused.steer_tokens_(steered, residual, directions, LAYER, token_map, 2)
    assert_close_to_float64(steered, hidden, residual, directions, token_map, 2)
    assert torch.equal(steered, hidden) == (doses == "off")


@sites
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_doses_beyond_the_depth_are_not_read(
    depth: int, rotations: str, device: torch.device
) -> None:
    directions, token_map = random_directions(rotations, 17, device), random_map(7, 4, device)
    hidden = random_rows(7, 17, torch.float32, device)
    expected = hidden.clone()
    front = TokenMap(token_map.directions[:depth], token_map.strengths[:, :depth])
    triton_fused.steer_tokens_(expected, None, directions, LAYER, front, depth)
    assert_close_to_float64(expected, hidden, None, directions, token_map, depth)
    token_map.strengths[:, depth:], token_map.directions[depth:] = math.nan, -(2**31)
    triton_fused.steer_tokens_(hidden, None, directions, LAYER, token_map, depth)
    assert torch.equal(hidden, expected)


@sites
@pytest.mark.parametrize("layer", range(NUM_LAYERS))
def test_a_layer_reads_its_own_vectors_and_strengths(
    layer: int, rotations: str, device: torch.device
) -> None:
    directions, token_map = random_directions(rotations, 16, device), random_map(5, 2, device)
    hidden = random_rows(5, 16, torch.float32, device)
    expected = written_out(hidden, None, directions, token_map, 2, layer)
    for other in set(range(NUM_LAYERS)) - {layer}:
        directions.vectors[other] = token_map.strengths[other] = math.nan
    triton_fused.steer_tokens_(hidden, None, directions, layer, token_map, 2)
    torch.testing.assert_close(hidden.double(), expected, rtol=0, atol=1e-5)


@dtypes
@sites
@residuals
def test_a_token_without_a_dose_keeps_any_bits(
    with_residual: bool, rotations: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Also next to steered tokens, and if its map has an invalid direction."""
    info = torch.finfo(dtype)
    special_values = [
        0.0,
        -0.0,
        math.inf,
        -math.inf,
        math.nan,
        info.max,
        info.min,
        info.tiny,
        info.tiny / 4,
    ]
    hidden = torch.tensor(special_values, dtype=dtype, device=device).repeat(6, 1)
    hidden[2] = 1.0
    residual = hidden.flip(1).contiguous() if with_residual else None
    before = hidden.clone()
    direction_rows = torch.full((2, 6), -(2**31), dtype=torch.int32, device=device)
    strengths = torch.zeros(NUM_LAYERS, 2, 6, device=device)
    strengths[:, :, 1] = -0.0
    direction_rows[0, 2], strengths[:, 0, 2] = 3, 3.0
    site = random_directions(rotations, len(special_values), device)
    triton_fused.steer_tokens_(
        hidden, residual, site, LAYER, TokenMap(direction_rows, strengths), 2
    )
    free = [0, 1, 3, 4, 5]
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(hidden[free].view(bits), before[free].view(bits))
    assert not torch.equal(hidden[2], before[2])


@sites
@residuals
@pytest.mark.parametrize("width", [33, TWO_BLOCKS], ids=["one-block", "two-blocks"])
def test_a_tokens_result_is_the_same_alone_and_at_any_position(
    width: int, with_residual: bool, rotations: str, device: torch.device
) -> None:
    num_tokens = 6
    directions, token_map = random_directions(rotations, width, device), random_map(6, 2, device)
    hidden = random_rows(num_tokens, width, torch.bfloat16, device)
    residual = random_rows(num_tokens, width, torch.bfloat16, device, 4) if with_residual else None
    together = hidden.clone()
    triton_fused.steer_tokens_(together, residual, directions, LAYER, token_map, 2)
    orders = [torch.tensor([4, 0, 5, 2, 1, 3]), *(torch.tensor([t]) for t in range(num_tokens))]
    for order in (order.to(device) for order in orders):
        rows = hidden[order]
        residual_copy = None if residual is None else residual[order]
        part = TokenMap(token_map.directions[:, order], token_map.strengths[:, :, order])
        triton_fused.steer_tokens_(rows, residual_copy, directions, LAYER, part, 2)
        assert torch.equal(rows, together[order])


@dtypes
@residuals
@pytest.mark.parametrize("width", [33, TWO_BLOCKS], ids=["one-block", "two-blocks"])
def test_a_token_without_rotation_gets_the_addition_bit_for_bit(
    width: int, with_residual: bool, dtype: torch.dtype, device: torch.device
) -> None:
    directions, token_map = random_directions("some", width, device), random_map(5, 2, device)
    token_map.directions[:] = torch.tensor([[2], [5]], device=device)
    hidden = random_rows(5, width, dtype, device)
    residual = random_rows(5, width, dtype, device, 4) * 1e3 if with_residual else None
    added = hidden.clone()
    triton_fused.steer_tokens_(hidden, residual, directions, LAYER, token_map, 2)
    additions = Directions(directions.vectors, None)
    triton_fused.steer_tokens_(added, residual, additions, LAYER, token_map, 2)
    assert torch.equal(hidden, added)


@dtypes
@sites
@pytest.mark.parametrize("width", [31, 32], ids=["odd", "even"])
def test_strided_rows_are_steered_in_place_and_nothing_around_them(
    width: int, rotations: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Rows and columns with gaps for the stream, columns before rows for the residual."""
    directions, token_map = random_directions(rotations, width, device), random_map(5, 2, device)
    frame = random_rows(10, 2 * width + 1, dtype, device)
    before, columns = frame.clone(), slice(1, 2 * width, 2)
    hidden = frame[::2, columns]
    residual = random_rows(width, 5, dtype, device, seed=4).T
    expected = hidden.contiguous()
    triton_fused.steer_tokens_(expected, residual.contiguous(), directions, LAYER, token_map, 2)
    triton_fused.steer_tokens_(hidden, residual, directions, LAYER, token_map, 2)
    assert torch.equal(hidden, expected)
    assert not torch.equal(hidden, before[::2, columns])
    hidden.copy_(before[::2, columns])
    assert torch.equal(frame, before)


@sites
@pytest.mark.parametrize("offset", [1, 8], ids=["one-off", "aligned"])
def test_rows_of_a_wider_tensor_are_steered_wherever_they_begin(
    offset: int, rotations: str, device: torch.device
) -> None:
    directions, token_map = random_directions(rotations, 32, device), random_map(5, 2, device)
    hidden = random_rows(5, 48, torch.float16, device)[:, offset : offset + 32]
    expected = hidden.contiguous()
    triton_fused.steer_tokens_(expected, None, directions, LAYER, token_map, 2)
    triton_fused.steer_tokens_(hidden, None, directions, LAYER, token_map, 2)
    assert torch.equal(hidden, expected)


@pytest.mark.parametrize("width", [5, TWO_BLOCKS], ids=["one-block", "two-blocks"])
@pytest.mark.parametrize("size", [0.5, 1.0, 3.0, 3e4])
def test_a_rotation_that_cancels_a_token_exactly_gives_no_nan(
    size: float, width: int, device: torch.device
) -> None:
    vectors = torch.zeros(NUM_LAYERS, 2, width, device=device)
    vectors[:, 1, width - 1] = 1.0
    directions = Directions(vectors, torch.tensor([0.0, 1.0], device=device))
    token_map = TokenMap(
        torch.ones(1, 1, dtype=torch.int32, device=device),
        torch.full((NUM_LAYERS, 1, 1), -size, device=device),
    )
    hidden = vectors[LAYER, 1:2] * size
    triton_fused.steer_tokens_(hidden, None, directions, LAYER, token_map, 1)
    assert torch.equal(hidden, torch.zeros_like(hidden))


@sites
@residuals
def test_warming_up_launches_every_kernel_of_a_site(
    with_residual: bool, rotations: str, device: torch.device
) -> None:
    directions = random_directions(rotations, 16, device)
    before = directions.vectors.clone()
    triton_fused.warm_up(
        directions,
        hidden_dtype=torch.bfloat16,
        residual_dtype=torch.bfloat16 if with_residual else None,
        num_doses=3,
    )
    assert torch.equal(directions.vectors, before)


KEYS_OF_CALLS = """
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import create_function_from_signature

from vllm_steer.kernels.guidance import Directions, TokenRules, TokenMap, triton_fused, triton_map

BACKEND = CUDABackend(GPUTarget("cuda", 90, 32))
keys = set()


class Kernel:
    def __init__(self, jit):
        self.name = jit.__name__
        self.bind = create_function_from_signature(jit.signature, jit.params, BACKEND)

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **kwargs):
        params, types, options = self.bind(*args, **kwargs)
        keys.add((self.name, *map(tuple, types), *sorted(options.items())))


triton_fused.add, triton_fused.rotate = Kernel(triton_fused.add), Kernel(triton_fused.rotate)
triton_map._map = Kernel(triton_map._map)
site, dtype, width, layers, room = SITE, torch.bfloat16, WIDTH, 3, 40
rotations = None if site == "add" else torch.ones(5)
directions = Directions(torch.zeros(layers, 5, width), rotations)
triton_fused.warm_up(directions, hidden_dtype=dtype, residual_dtype=dtype, num_doses=4)
warm = set(keys)
whole = TokenMap(torch.zeros(4, room, dtype=torch.int32), torch.zeros(layers, 4, room))
frame = torch.zeros(2 * room, 2 * width + 8, dtype=dtype)
for tokens in (1, 2, 16, 17, 33):
    for depth in (1, 2, 4):
        *integers, table = torch.zeros(4, depth, tokens, dtype=torch.int64)
        spans = torch.zeros(2, 1, depth, tokens, dtype=torch.int64)
        floats = torch.zeros(layers + 2, depth, tokens)
        history = torch.zeros(3 * tokens)[tokens : 2 * tokens]
        rules = TokenRules(*integers, *spans, floats[0], floats[1], floats[2:], table, history)
        for positions in (torch.int32, torch.int64):
            front = TokenMap(whole.directions[:depth], whole.strengths[:, :depth])
            starts = torch.zeros(3 * tokens + 1, dtype=torch.int32)[: tokens + 1]
            triton_map.map_tokens(rules, starts, torch.zeros(room, dtype=positions)[:tokens], front)
        for layer in range(layers):
            for hidden in (
                torch.zeros(tokens, width, dtype=dtype),
                frame[:tokens, :width],
                frame[:tokens, 1 : width + 1],
                frame[: 2 * tokens : 2, : 2 * width : 2],
                torch.zeros(width, tokens, dtype=dtype).T,
            ):
                for residual in (None, torch.zeros(tokens, width, dtype=dtype), hidden):
                    triton_fused.steer_tokens_(hidden, residual, directions, layer, whole, depth)
assert keys == warm, f"not warm: {keys - warm}"
print(len(warm))
"""


@pytest.mark.parametrize("width", [40, 12, 41, 1])
@pytest.mark.parametrize(("site", "steering"), [("add", 2), ("rotate", 4)])
def test_no_serving_call_compiles_a_kernel_after_warm_up(
    site: str, steering: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's own keys of compiled kernels, taken without compiling; two more are the map's."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    script = KEYS_OF_CALLS.replace("SITE", repr(site)).replace("WIDTH", str(width))
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    kernels = steering if width % 8 == 0 else steering // 2
    assert int(process.stdout) == kernels + 2
