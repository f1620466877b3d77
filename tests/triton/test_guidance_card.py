"""Guidance in Triton at full size on a card: ``triton_fused`` against float64."""

import pytest
import torch
import triton

from vllm_steer.kernels.guidance import (
    Directions,
    TokenMap,
    TokenRules,
    torch_gather,
    triton_fused,
    triton_map,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        triton.knobs.runtime.interpret or not torch.cuda.is_available(),
        reason="needs a CUDA device and compiled kernels",
    ),
]

WIDTH, NUM_LAYERS, NUM_DIRECTIONS, DEPTH = 4096, 32, 8, 4
FOREVER = torch.iinfo(torch.int64).max

sites = pytest.mark.parametrize("rotations", ["none", "some"])


def card(seed: int) -> torch.Generator:
    return torch.Generator("cuda").manual_seed(seed)


def random_directions(rotations: str, num_layers: int = 1, width: int = WIDTH) -> Directions:
    """Unit vectors, direction 0 zero; with rotations, the odd directions rotate."""
    size = (num_layers, NUM_DIRECTIONS, width)
    vectors = torch.randn(size, device="cuda", generator=card(5))
    vectors /= vectors.norm(dim=2, keepdim=True)
    vectors[:, 0] = 0
    turning = torch.arange(NUM_DIRECTIONS, device="cuda") % 2
    return Directions(vectors, None if rotations == "none" else turning.float())


def random_map(num_tokens: int, num_layers: int = 1, seed: int = 7) -> TokenMap:
    """Half of the doses act; every fourth token has none."""
    direction_rows = torch.randint(
        1, NUM_DIRECTIONS, (DEPTH, num_tokens), device="cuda", generator=card(seed)
    )
    size = (num_layers, DEPTH, num_tokens)
    strengths = torch.randn(size, device="cuda", generator=card(seed + 1)) * 20
    strengths *= torch.rand(size, device="cuda", generator=card(seed + 2)) < 0.5
    strengths[:, :, 3::4] = 0
    return TokenMap(direction_rows.to(torch.int32), strengths)


def random_rows(num_tokens: int, dtype: torch.dtype, seed: int = 3) -> torch.Tensor:
    rows = torch.randn(num_tokens, WIDTH, device="cuda", generator=card(seed)) * 3
    return rows.to(dtype)


def written_out(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    directions: Directions,
    layer: int,
    token_map: TokenMap,
) -> torch.Tensor:
    """``x + change``, at ``x``'s norm where a dose rotates, less the residual; all in float64."""
    change = torch.zeros_like(hidden, dtype=torch.float64)
    turning = torch.zeros(hidden.shape[0], 1, dtype=torch.bool, device="cuda")
    for k in range(DEPTH):
        direction_rows = token_map.directions[k].long()
        strength = token_map.strengths[layer, k].double()[:, None]
        change += strength * directions.vectors[layer].double()[direction_rows]
        if directions.is_rotation is not None:
            turning |= (directions.is_rotation[direction_rows] != 0)[:, None] & (strength != 0)
    x = hidden.double() if residual is None else hidden.double() + residual.double()
    steered = x + change
    turned = steered * (x.norm(dim=1, keepdim=True) / steered.norm(dim=1, keepdim=True))
    steered = torch.where(turning, turned, steered)
    return steered if residual is None else steered - residual.double()


def free_tokens(token_map: TokenMap, layer: int) -> torch.Tensor:
    return (token_map.strengths[layer] == 0).all(dim=0)


@sites
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_prefill_of_8192_tokens_equals_the_float64_calculation(
    dtype: torch.dtype, with_residual: bool, rotations: str
) -> None:
    """float32 within 2e-7 of the tensor's scale, 16 bits within twice the torch backend's error."""
    directions, token_map = random_directions(rotations), random_map(8192)
    hidden = random_rows(8192, dtype)
    residual = random_rows(8192, dtype, seed=4) if with_residual else None
    expected = written_out(hidden, residual, directions, 0, token_map)
    steered, plain = hidden.clone(), hidden.clone()
    triton_fused.steer_tokens_(steered, residual, directions, 0, token_map, DEPTH)
    error = (steered.double() - expected).abs().max()
    if dtype == torch.float32:
        assert error <= 2e-7 * expected.abs().max()
    else:
        torch_gather.steer_tokens_(plain, residual, directions, 0, token_map, DEPTH)
        assert error <= 2 * (plain.double() - expected).abs().max()
    free = free_tokens(token_map, 0)
    assert torch.equal(steered[free], hidden[free])


@sites
def test_each_of_32_layers_is_steered_by_its_own_tables(rotations: str) -> None:
    directions, token_map = random_directions(rotations, NUM_LAYERS), random_map(256, NUM_LAYERS)
    residual = random_rows(256, torch.bfloat16, seed=4)
    for layer in range(NUM_LAYERS):
        hidden = random_rows(256, torch.bfloat16, seed=layer)
        expected = written_out(hidden, residual, directions, layer, token_map)
        steered, plain = hidden.clone(), hidden.clone()
        triton_fused.steer_tokens_(steered, residual, directions, layer, token_map, DEPTH)
        torch_gather.steer_tokens_(plain, residual, directions, layer, token_map, DEPTH)
        error = (steered.double() - expected).abs().max()
        assert error <= 2 * (plain.double() - expected).abs().max()
        free = free_tokens(token_map, layer)
        assert torch.equal(steered[free], hidden[free])


@sites
def test_a_tokens_result_on_the_card_is_the_same_alone_and_in_a_batch(rotations: str) -> None:
    directions, token_map = random_directions(rotations), random_map(512)
    hidden = random_rows(512, torch.bfloat16)
    together = hidden.clone()
    triton_fused.steer_tokens_(together, None, directions, 0, token_map, DEPTH)
    for token in (0, 1, 200, 511):
        alone = hidden[token : token + 1].clone()
        map_of_token = TokenMap(
            token_map.directions[:, token : token + 1],
            token_map.strengths[:, :, token : token + 1],
        )
        triton_fused.steer_tokens_(alone, None, directions, 0, map_of_token, DEPTH)
        assert torch.equal(alone[0], together[token])


def test_the_map_on_the_card_equals_the_torch_backend() -> None:
    token_rules = random_rules(256, seed=1)
    counts = torch.randint(0, 65, (256,), device="cuda", generator=card(2))
    query_start_loc = torch.zeros(257, dtype=torch.int32, device="cuda")
    query_start_loc[1:] = counts.cumsum(0)
    num_tokens = int(query_start_loc[-1])
    positions = torch.randint(0, 200, (num_tokens,), device="cuda", generator=card(3))
    out, plain = empty_map(num_tokens + 5), empty_map(num_tokens + 5)
    triton_fused.map_tokens(token_rules, query_start_loc, positions, out)
    torch_gather.map_tokens(token_rules, query_start_loc, positions, plain)
    assert torch.equal(out.directions, plain.directions)
    assert torch.equal(out.strengths, plain.strengths)
    assert out.strengths.any()


def random_rules(num_requests: int, seed: int) -> TokenRules:
    """Vectors that act from some position on, and deltas; directions stay within the weights."""
    shape, generator = (DEPTH, num_requests), card(seed)

    def integers(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, shape, device="cuda", generator=generator)

    first, delta = integers(0, 100), integers(0, 2)
    return TokenRules(
        direction_start=1 + integers(0, 3),
        direction_stride=delta,
        step0_position=first,
        begin=first[None],
        end=torch.where(delta == 1, first + 4, FOREVER)[None],
        strength=torch.randn(shape, device="cuda", generator=generator) * 20,
        slope=delta * 0.25,
        layers=integers(0, 2).float().repeat(NUM_LAYERS, 1, 1),
        pool_offset=integers(-200, 200).clamp(min=-1),
        strength_pool=torch.randn(300, device="cuda", generator=generator) * 20,
    )


def empty_map(num_tokens: int) -> TokenMap:
    return TokenMap(
        torch.zeros(DEPTH, num_tokens, dtype=torch.int32, device="cuda"),
        torch.zeros(NUM_LAYERS, DEPTH, num_tokens, device="cuda"),
    )


@sites
def test_a_captured_graph_replays_with_the_current_content_of_its_buffers(rotations: str) -> None:
    """Map and layers in one graph; new rules and rows in the same buffers, then a replay."""
    directions, out = random_directions(rotations, NUM_LAYERS), empty_map(256)
    hidden = random_rows(256, torch.bfloat16)
    residual = random_rows(256, torch.bfloat16, seed=4)
    rules = random_rules(64, seed=1)
    query_start_loc = torch.arange(0, 257, 4, dtype=torch.int32, device="cuda")
    positions = torch.randint(0, 200, (256,), device="cuda", generator=card(2))
    triton_fused.warm_up(
        directions, hidden_dtype=torch.bfloat16, residual_dtype=torch.bfloat16, num_doses=DEPTH
    )
    torch.cuda.synchronize()

    def step() -> None:
        triton_fused.map_tokens(rules, query_start_loc, positions, out)
        for layer in range(NUM_LAYERS):
            triton_fused.steer_tokens_(hidden, residual, directions, layer, out, DEPTH)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    results = []
    for seed in (11, 12):
        token_rules, rows = random_rules(64, seed), random_rows(256, torch.bfloat16, seed)
        for name, tensor in vars(rules).items():
            if tensor is not None:
                tensor.copy_(getattr(token_rules, name))
        positions.copy_(torch.randint(0, 200, (256,), device="cuda", generator=card(seed)))
        hidden.copy_(rows)
        graph.replay()
        replayed, mapped = hidden.clone(), out.strengths.clone()
        hidden.copy_(rows)
        out.strengths.fill_(9)
        step()
        assert torch.equal(out.strengths, mapped)
        assert torch.equal(hidden, replayed)
        assert not torch.equal(hidden, rows)
        results.append(mapped)
    assert not torch.equal(*results)


def room_for(num_bytes: int) -> None:
    """Skip where the card has less memory left."""
    free, _ = torch.cuda.mem_get_info()
    if free < num_bytes:
        pytest.skip(f"needs {num_bytes >> 30} GiB of GPU memory, {free >> 30} GiB are free")


@sites
def test_rows_beyond_two_to_the_31_numbers_are_steered(rotations: str) -> None:
    num_tokens = 2**31 // WIDTH + 8
    room_for(8 << 30)
    directions = random_directions(rotations)
    token_map = TokenMap(
        torch.full((1, num_tokens), 2, dtype=torch.int32, device="cuda"),
        torch.zeros(1, 1, num_tokens, device="cuda"),
    )
    token_map.strengths[:, :, [0, -1]] = 3.0
    hidden = torch.zeros(num_tokens, WIDTH, dtype=torch.bfloat16, device="cuda")
    triton_fused.steer_tokens_(hidden, None, directions, 0, token_map, 1)
    expected = (3 * directions.vectors[0, 2]).bfloat16()
    assert torch.equal(hidden[0], expected)
    assert torch.equal(hidden[-1], expected)
    assert not hidden[1:-1].any()


@sites
def test_directions_beyond_two_to_the_31_numbers_are_read(rotations: str) -> None:
    """The last direction of a table, in one layer, and in a layer of a table of many layers."""
    room_for(12 << 30)
    for num_layers in (1, 4):
        num_directions = 2**31 // WIDTH // num_layers + 8
        vectors = torch.zeros(num_layers, num_directions, WIDTH, device="cuda")
        vectors[-1, -1] = torch.arange(WIDTH, device="cuda") / WIDTH
        turning = None if rotations == "none" else torch.zeros(num_directions, device="cuda")
        token_map = TokenMap(
            torch.full((1, 3), num_directions - 1, dtype=torch.int32, device="cuda"),
            torch.full((num_layers, 1, 3), 2.0, device="cuda"),
        )
        hidden = torch.zeros(3, WIDTH, device="cuda")
        site = Directions(vectors, turning)
        triton_fused.steer_tokens_(hidden, None, site, num_layers - 1, token_map, 1)
        assert torch.equal(hidden, 2 * vectors[-1, -1].expand(3, -1))
        del vectors, site
        torch.cuda.empty_cache()


def num_compiled() -> int:
    """Kernels that Triton holds for this card."""
    device = torch.cuda.current_device()
    kernels = (triton_fused.add, triton_fused.rotate, triton_map._map)
    return sum(len(kernel.device_caches[device][0]) for kernel in kernels)


@sites
@pytest.mark.parametrize("width", [1536, 1537], ids=["aligned", "odd"])
def test_nothing_compiles_after_warming_up(width: int, rotations: str) -> None:
    directions = random_directions(rotations, 2, width)
    dtype, before = torch.bfloat16, num_compiled()
    triton_fused.warm_up(directions, hidden_dtype=dtype, residual_dtype=dtype, num_doses=DEPTH)
    warm = num_compiled()
    assert warm > before
    token_map, token_rules = random_map(257, 2), random_rules(3, seed=1)
    rules = TokenRules(
        **{
            name: t[:2] if name == "layers" else t
            for name, t in vars(token_rules).items()
            if t is not None
        }
    )
    frame = torch.zeros(514, 2 * width + 8, dtype=dtype, device="cuda")
    for num_tokens in (1, 2, 16, 257):
        starts = torch.tensor([0, 0, 1, num_tokens], dtype=torch.int32, device="cuda")
        for positions in (torch.int32, torch.int64):
            places = torch.arange(num_tokens, dtype=positions, device="cuda")
            triton_fused.map_tokens(rules, starts, places, token_map)
        for hidden in (
            torch.zeros(num_tokens, width, dtype=dtype, device="cuda"),
            frame[:num_tokens, :width],
            frame[:num_tokens, 1 : width + 1],
            frame[: 2 * num_tokens : 2, : 2 * width : 2],
        ):
            for residual in (None, torch.zeros(num_tokens, width, dtype=dtype, device="cuda")):
                for depth in range(1, DEPTH + 1):
                    triton_fused.steer_tokens_(hidden, residual, directions, 1, token_map, depth)
    assert num_compiled() == warm
