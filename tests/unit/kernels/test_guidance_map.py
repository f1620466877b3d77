"""From rules to the map of a step's tokens: both backends against a loop over tokens."""

from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from vllm_steer.kernels.dispatch import guidance_backend
from vllm_steer.kernels.guidance import (
    PLACEHOLDER_STRIDE,
    Directions,
    TokenMap,
    TokenRules,
    cpu,
    reference,
    torch_gather,
)
from vllm_steer.kernels.guidance.operands import DOSE_FIELDS

FOREVER = torch.iinfo(torch.int64).max
EPS = torch.finfo(torch.float32).eps

backends = pytest.mark.parametrize("backend", [reference, torch_gather], ids=["reference", "torch"])


def rules(
    layers: int = 1, strength_pool: Sequence[float] = (0.0,), **fields: Sequence[Sequence[float]]
) -> TokenRules:
    """TokenRules ``[K, R]`` from lists; a field that is not named is zero, layers are all on.

    Without ``pool_offset`` no dose has one.
    """
    shape = (len(fields["direction_start"]), len(fields["direction_start"][0]))
    floats = {"strength", "slope"}
    names = (
        "direction_start",
        "direction_stride",
        "step0_position",
        "begin",
        "end",
        "strength",
        "slope",
    )
    tensors: dict[str, Any] = {
        name: torch.tensor(
            fields[name], dtype=torch.float32 if name in floats else torch.int64
        ).view(shape)
        if name in fields
        else torch.zeros(shape, dtype=torch.float32 if name in floats else torch.int64)
        for name in names
    }
    tensors |= {name: tensors[name][None] for name in ("begin", "end")}
    offsets = torch.tensor(fields.get("pool_offset", [[-1] * shape[1]] * shape[0])).view(shape)
    ones = torch.ones(layers, *shape)
    return TokenRules(
        **tensors, layers=ones, pool_offset=offsets, strength_pool=torch.tensor(strength_pool)
    )


def empty_map(num_layers: int, depth: int, max_tokens: int) -> TokenMap:
    """Buffers filled with a marker, to detect entries that were not written."""
    return TokenMap(
        torch.full((depth, max_tokens), -9, dtype=torch.int32),
        torch.full((num_layers, depth, max_tokens), -9.0),
    )


def tokens_of(
    counts: Sequence[int], starts: Sequence[int], dtype: torch.dtype = torch.int32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each request's first token ``[R + 1]``, and the position of every token."""
    ends = torch.tensor([0, *counts]).cumsum(0).to(dtype)
    positions = [start + i for start, n in zip(starts, counts, strict=True) for i in range(n)]
    return ends, torch.tensor(positions, dtype=torch.int64)


def random_rules(seed: int, depth: int, num_requests: int, num_layers: int) -> TokenRules:
    """Vectors and deltas in turn, some without a dose, some in a part of the layers.

    About half take their strengths from a history, which ends before some of their steps.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (depth, num_requests)

    def integers(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    first, length = integers(0, 12), integers(0, 9)
    last = torch.where(integers(0, 3) == 0, FOREVER, first + length)
    is_present = (integers(0, 4) > 0).float()
    return TokenRules(
        direction_start=integers(1, 40),
        direction_stride=integers(0, 2),
        step0_position=first - integers(0, 2),
        begin=torch.stack([first, last.clamp(max=20) + 2]),  # a second span behind the first
        end=torch.stack([last, last.clamp(max=20) + 1 + integers(0, 4)]),
        strength=torch.randn(shape, generator=generator) * is_present,
        slope=torch.rand(shape, generator=generator) * integers(0, 2),
        layers=torch.randint(0, 2, (num_layers, *shape), generator=generator).float(),
        pool_offset=integers(-15, 15).clamp(min=-1),
        strength_pool=torch.randn(16, generator=generator),
    )


def subset(token_rules: TokenRules, at: Any) -> TokenRules:
    """The rules ``at`` an index of the last dimensions; the history is of all."""
    return TokenRules(
        **{
            name: tensor if name == "strength_pool" else tensor[..., *at]
            for name, tensor in vars(token_rules).items()
            if tensor is not None
        }
    )


def assert_mapped(
    token_rules: TokenRules, counts: Sequence[int], starts: Sequence[int], out: TokenMap
) -> None:
    """Check every entry against the equations in Python numbers; unused entries are unchanged."""
    token = 0
    for row, (count, start) in enumerate(zip(counts, starts, strict=True)):
        for position in range(start, start + count):
            for k in range(token_rules.direction_start.shape[0]):
                at = {
                    name: getattr(token_rules, name)[k, row].item()
                    for name in vars(token_rules)
                    if name in DOSE_FIELDS and name not in ("begin", "end")
                }
                i = position - at["step0_position"]
                acts = any(
                    begin[k, row] <= position < end[k, row]
                    for begin, end in zip(token_rules.begin, token_rules.end, strict=True)
                )
                direction = at["direction_start"] + at["direction_stride"] * i if acts else 0
                strength = at["strength"] * (1 - at["slope"] * i) if acts else 0.0
                if at["pool_offset"] >= 0 and acts:
                    inside = 0 <= at["pool_offset"] + i < len(token_rules.strength_pool)
                    strength = (
                        token_rules.strength_pool[at["pool_offset"] + i].item() if inside else 0.0
                    )
                assert out.directions[k, token] == direction
                allowed = 4 * EPS * abs(at["strength"]) * (1 + abs(at["slope"] * i))
                for layer in range(token_rules.layers.shape[0]):
                    expected = strength * token_rules.layers[layer, k, row].item()
                    assert abs(out.strengths[layer, k, token].item() - expected) <= allowed
            token += 1
    assert (out.directions[:, token:] == -9).all()
    assert (out.strengths[:, :, token:] == -9).all()


@backends
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("counts", "starts"),
    [
        ([1], [0]),
        ([1, 1, 1], [0, 7, 3]),
        ([13], [0]),
        ([5, 1, 7], [0, 9, 4]),
        ([0, 3, 0, 0, 2, 0], [4, 1, 0, 9, 5, 2]),
        ([17, 11, 23, 12], [0, 3, 0, 1]),
    ],
    ids=["one", "decodes", "prefill", "mixed", "without-tokens", "63-tokens"],
)
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_every_token_is_mapped_by_the_rule_of_its_request(
    backend: ModuleType, depth: int, counts: list[int], starts: list[int], dtype: torch.dtype
) -> None:
    for seed in range(3):
        token_rules = random_rules(seed, depth, len(counts), num_layers=3)
        out = empty_map(3, depth, sum(counts) + 2)
        backend.map_tokens(token_rules, *tokens_of(counts, starts, dtype), out)
        assert_mapped(token_rules, counts, starts, out)


def text_only_rules(
    token_rules: TokenRules, ranges: Sequence[Sequence[tuple[int, int]]], seed: int
) -> TokenRules:
    """The rules with half of their doses leaving out ``ranges``, those of each request."""
    generator = torch.Generator().manual_seed(seed)
    text_only = torch.randint(0, 2, token_rules.strength.shape, generator=generator)
    bounds = [
        row * PLACEHOLDER_STRIDE + bound
        for row, of_request in enumerate(ranges)
        for pair in of_request
        for bound in pair
    ]
    return replace(
        token_rules, text_only=text_only, placeholder_bounds=torch.tensor(bounds, dtype=torch.int64)
    )


def without_placeholders(
    token_rules: TokenRules,
    ranges: Sequence[Sequence[tuple[int, int]]],
    counts: Sequence[int],
    starts: Sequence[int],
    out: TokenMap,
) -> TokenMap:
    """A map in which every dose acts, less what the doses of text leave out."""
    expected = TokenMap(out.directions.clone(), out.strengths.clone())
    rows = [row for row, count in enumerate(counts) for _ in range(count)]
    for token, position in enumerate(tokens_of(counts, starts)[1].tolist()):
        if any(begin <= position < end for begin, end in ranges[rows[token]]):
            leaves_out = token_rules.text_only[:, rows[token]] == 1  # type: ignore[index]
            expected.directions[leaves_out, token] = 0
            expected.strengths[:, leaves_out, token] = 0
    return expected


RANGES = [
    [(0, 3), (5, 6), (7, 12)],
    [],
    [(2, 20)],
    [(1, 2), (3, 4), (9, 9 + 5)],
]


@backends
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("counts", "starts"),
    [
        ([1, 1, 1, 1], [6, 0, 19, 9]),
        ([13, 0, 22, 0], [0, 0, 0, 0]),
        ([4, 3, 1, 12], [3, 2, 2, 1]),
    ],
    ids=["single-tokens", "prefill", "chunks"],
)
def test_a_dose_of_text_leaves_out_placeholders(
    backend: ModuleType, counts: list[int], starts: list[int], dtype: torch.dtype
) -> None:
    for seed in range(8):
        plain = random_rules(seed, 3, 4, num_layers=2)
        token_rules = text_only_rules(plain, RANGES, seed)
        step = tokens_of(counts, starts, dtype)
        out, of_text = empty_map(2, 3, sum(counts) + 2), empty_map(2, 3, sum(counts) + 2)
        backend.map_tokens(plain, *step, out)
        backend.map_tokens(token_rules, *step, of_text)
        expected = without_placeholders(token_rules, RANGES, counts, starts, out)
        assert torch.equal(of_text.directions, expected.directions)
        assert torch.equal(of_text.strengths, expected.strengths)
        if backend is not torch_gather:
            continue
        directions = random_directions(2, is_rotation=0.0)
        changes = cpu.step_changes(token_rules, *step, directions)
        assert changes is not None
        hidden = torch.zeros(sum(counts), directions.vectors.shape[2])
        for layer in range(2):
            computed, by_map = hidden.clone(), hidden.clone()
            changes.add_(computed, layer)
            torch_gather.steer_tokens_(by_map, None, directions, layer, of_text, 3)
            assert torch.equal(computed, by_map)


@backends
@pytest.mark.parametrize("depth", [1, 3])
def test_a_step_without_tokens_writes_nothing(backend: ModuleType, depth: int) -> None:
    out = empty_map(2, depth, 4)
    token_rules = random_rules(0, depth, 2, num_layers=2)
    backend.map_tokens(token_rules, *tokens_of([0, 0], [0, 0]), out)
    assert_mapped(token_rules, [0, 0], [0, 0], out)


@backends
def test_a_delta_walks_its_steps_from_the_last_prompt_token(backend: ModuleType) -> None:
    """Prompt of 3, 4 steps from direction 6 on, falling: the span is [2, 6)."""
    token_rules = rules(
        direction_start=[[6]],
        direction_stride=[[1]],
        step0_position=[[2]],
        begin=[[2]],
        end=[[6]],
        strength=[[2.0]],
        slope=[[0.25]],
    )
    out = empty_map(1, 1, 8)
    backend.map_tokens(token_rules, *tokens_of([8], [0]), out)
    assert out.directions.tolist() == [[0, 0, 6, 7, 8, 9, 0, 0]]
    assert out.strengths.tolist() == [[[0, 0, 2.0, 1.5, 1.0, 0.5, 0, 0]]]


@backends
def test_a_chunk_and_a_recomputed_part_map_like_the_whole_prompt(backend: ModuleType) -> None:
    token_rules = random_rules(4, 2, 1, num_layers=2)
    whole, parts = empty_map(2, 2, 20), empty_map(2, 2, 20)
    backend.map_tokens(token_rules, *tokens_of([20], [0]), whole)
    for start, stop in [(0, 7), (7, 8), (8, 19), (19, 20)]:
        part = TokenMap(parts.directions[:, start:], parts.strengths[:, :, start:])
        backend.map_tokens(token_rules, *tokens_of([stop - start], [start]), part)
    assert torch.equal(parts.directions, whole.directions)
    assert torch.equal(parts.strengths, whole.strengths)


@backends
@pytest.mark.parametrize("strength", [3e38, -3e38, 1e37, 1e-45], ids=str)
def test_a_token_outside_the_span_gets_no_strength(backend: ModuleType, strength: float) -> None:
    """The falling line of a delta reaches beyond float32 a long prompt before its first step."""
    token_rules = rules(
        direction_start=[[1]],
        direction_stride=[[1]],
        step0_position=[[100_000]],
        begin=[[100_000]],
        end=[[100_005]],
        strength=[[strength]],
        slope=[[0.2]],
    )
    out = empty_map(1, 1, 4)
    positions = torch.tensor([0, 99_999, 100_000, 100_005])
    backend.map_tokens(token_rules, torch.tensor([0, 4]), positions, out)
    assert out.directions.tolist() == [[0, 0, 1, 0]]
    assert out.strengths[0, 0].tolist() == [0, 0, torch.tensor(strength).item(), 0]


@backends
def test_positions_beyond_32_bits_are_distinguished(backend: ModuleType) -> None:
    edge = 2**32 + 5
    token_rules = rules(
        direction_start=[[3, 3]], strength=[[1.5, 2.5]], begin=[[0, edge]], end=[[edge, FOREVER]]
    )
    out = empty_map(1, 1, 4)
    positions = torch.tensor([edge - 1, edge, edge - 1, edge])
    backend.map_tokens(token_rules, torch.tensor([0, 2, 4]), positions, out)
    assert out.directions.tolist() == [[3, 0, 0, 3]]
    assert out.strengths[0, 0].tolist() == [1.5, 0, 0, 2.5]


@backends
def test_a_dose_acts_in_its_layers_only(backend: ModuleType) -> None:
    token_rules = rules(
        layers=3, direction_start=[[2], [4]], end=[[FOREVER], [FOREVER]], strength=[[1.0], [2.0]]
    )
    token_rules.layers[:, 0, 0] = torch.tensor([1.0, 0, 1])
    token_rules.layers[:, 1, 0] = torch.tensor([0.0, 1, 0])
    out = empty_map(3, 2, 1)
    backend.map_tokens(token_rules, *tokens_of([1], [9]), out)
    assert out.directions[:, 0].tolist() == [2, 4]
    assert out.strengths[:, :, 0].tolist() == [[1, 0], [0, 2], [1, 0]]


@backends
def test_rules_and_buffers_may_be_views(backend: ModuleType) -> None:
    token_rules = random_rules(2, 4, 3, num_layers=3)
    half = subset(token_rules, (slice(None, None, 2), slice(None)))
    whole = empty_map(3, 4, 9)
    front = TokenMap(whole.directions[:2], whole.strengths[:, :2])
    backend.map_tokens(half, *tokens_of([2, 3, 1], [0, 5, 2]), front)
    assert_mapped(half, [2, 3, 1], [0, 5, 2], front)
    assert (whole.directions[2:] == -9).all()
    assert (whole.strengths[:, 2:] == -9).all()


@backends
def test_permuted_requests_give_permuted_maps(backend: ModuleType) -> None:
    token_rules = random_rules(8, 2, 4, num_layers=2)
    order = [2, 0, 3, 1]
    permuted = subset(token_rules, (order,))
    starts = [0, 6, 2, 9]
    one, other = empty_map(2, 2, 4), empty_map(2, 2, 4)
    backend.map_tokens(token_rules, *tokens_of([1] * 4, starts), one)
    backend.map_tokens(permuted, *tokens_of([1] * 4, [starts[i] for i in order]), other)
    assert torch.equal(other.directions, one.directions[:, order])
    assert torch.equal(other.strengths, one.strengths[:, :, order])


@backends
def test_a_dose_with_a_history_gets_its_own_strength_at_every_step(backend: ModuleType) -> None:
    """Prompts of 3 and 2. A delta of 4 steps and a vector from the history, beside fixed ones."""
    token_rules = rules(
        direction_start=[[6, 20], [30, 31]],
        direction_stride=[[1, 0], [0, 0]],
        step0_position=[[2, 1], [0, 0]],
        begin=[[2, 1], [0, 0]],
        end=[[6, FOREVER], [FOREVER, 0]],
        strength=[[9.0, 9.0], [0.5, 9.0]],
        slope=[[0.25, 0], [0, 0]],
        pool_offset=[[1, 5], [-1, 0]],
        strength_pool=[99.0, 1.0, 1.5, 0.0, -2.0, 3.0, 4.0, 5.0],
    )
    out = empty_map(1, 2, 11)
    backend.map_tokens(token_rules, *tokens_of([7, 4], [0, 0]), out)
    assert out.directions.tolist() == [[0, 0, 6, 7, 8, 9, 0, 0, 20, 20, 20], [30] * 7 + [0] * 4]
    assert out.strengths.tolist() == [
        [[0, 0, 1.0, 1.5, 0.0, -2.0, 0, 0, 3.0, 4.0, 5.0], [0.5] * 7 + [0.0] * 4]
    ]


@backends
def test_a_chunk_may_span_many_steps_of_a_history(backend: ModuleType) -> None:
    """A request that is computed again from the start keeps its strengths."""
    steps = [0.25 * step - 1 for step in range(12)]
    token_rules = rules(
        direction_start=[[1]],
        step0_position=[[3]],
        begin=[[3]],
        end=[[FOREVER]],
        pool_offset=[[2]],
        strength_pool=[7, 7, *steps],
    )
    whole, parts = empty_map(1, 1, 15), empty_map(1, 1, 15)
    backend.map_tokens(token_rules, *tokens_of([15], [0]), whole)
    assert whole.strengths[0, 0].tolist() == [0, 0, 0, *steps]
    for start, stop in [(0, 2), (2, 9), (9, 10), (10, 15)]:
        part = TokenMap(parts.directions[:, start:], parts.strengths[:, :, start:])
        backend.map_tokens(token_rules, *tokens_of([stop - start], [start]), part)
    assert torch.equal(parts.strengths, whole.strengths)


@backends
@pytest.mark.parametrize("length", [1, 3])
def test_a_step_beyond_the_history_gets_strength_zero(backend: ModuleType, length: int) -> None:
    """Numbers before and after it in memory must not be read."""
    memory = torch.full((length + 8,), torch.nan)
    memory[4:-4] = torch.arange(1.0, length + 1)
    token_rules = rules(
        direction_start=[[1]],
        step0_position=[[2]],
        end=[[FOREVER]],
        pool_offset=[[0]],
        strength=[[3e38]],
        slope=[[1e30]],
    )
    token_rules = replace(token_rules, strength_pool=memory[4:-4])
    out = empty_map(1, 1, 9)
    positions = torch.tensor([0, 1, 2, 3, 4, 5, 6, 2**40, FOREVER - 1])
    backend.map_tokens(token_rules, torch.tensor([0, 9]), positions, out)
    strengths = [float(step) if step <= length else 0.0 for step in range(1, 6)]
    assert out.strengths[0, 0].tolist() == [0, 0, *strengths, 0, 0]


@backends
def test_the_map_reads_the_history_when_it_is_made(backend: ModuleType) -> None:
    token_rules = rules(
        direction_start=[[1]], end=[[FOREVER]], pool_offset=[[1]], strength_pool=[0.0] * 3
    )
    out = empty_map(1, 1, 2)
    for number in (1.5, -0.25):
        token_rules.strength_pool[1:].fill_(number)
        backend.map_tokens(token_rules, *tokens_of([2], [0]), out)
        assert out.strengths[0, 0].tolist() == [number, number]


@backends
def test_a_strength_that_is_not_finite_changes_its_own_tokens_only(backend: ModuleType) -> None:
    token_rules = rules(
        direction_start=[[1, 1]],
        end=[[2, FOREVER]],
        strength=[[1.0, 1.0]],
        pool_offset=[[0, -1]],
        strength_pool=[0.5, torch.nan, torch.nan],
    )
    out = empty_map(1, 1, 5)
    backend.map_tokens(token_rules, *tokens_of([3, 2], [0, 1]), out)
    assert out.strengths[0, 0, [0, 2, 3, 4]].tolist() == [0.5, 0, 1, 1]
    assert out.strengths[0, 0, 1].isnan()


def random_directions(num_layers: int, is_rotation: float | None = None) -> Directions:
    vectors = torch.randn(num_layers, 80, 6, generator=torch.Generator().manual_seed(3))
    vectors[:, 0] = 0
    return Directions(vectors, None if is_rotation is None else torch.full((80,), is_rotation))


def by_reference(
    token_rules: TokenRules, step: tuple[torch.Tensor, torch.Tensor], directions: Directions
) -> list[torch.Tensor]:
    """The change of the step in each layer, mapped and steered one token at a time."""
    num_layers, depth = token_rules.layers.shape[:2]
    num_tokens = len(step[1])
    out = empty_map(num_layers, depth, num_tokens)
    reference.map_tokens(token_rules, *step, out)
    added = [torch.zeros(num_tokens, 6, dtype=torch.float64) for _ in range(num_layers)]
    for layer, hidden in enumerate(added):
        reference.steer_tokens_(hidden, None, directions, layer, out, depth)
    return added


@pytest.mark.parametrize(
    ("counts", "starts"),
    [
        ([1], [0]),
        ([1, 1, 1], [0, 7, 3]),
        ([1] * 12, [0, 7, 3, 12, 4, 9, 30, 2, 1, 5, 6, 11]),
        ([13], [0]),
        ([5, 1, 7], [0, 9, 4]),
        ([0, 2, 0, 1], [4, 1, 0, 9]),
        ([2, 0, 1], [6, 4, 9]),
    ],
    ids=[
        *("one", "decodes", "many-decodes", "prefill", "mixed", "without-tokens"),
        "as-many-tokens-as-requests",
    ],
)
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_cpu_backend_adds_the_same_as_the_map_in_every_layer(
    counts: list[int], starts: list[int], depth: int, dtype: torch.dtype
) -> None:
    """Bit for bit, since the other requests of a step decide whether it is mapped."""
    directions, step = random_directions(3), tokens_of(counts, starts)
    before = torch.randn(sum(counts), 6, generator=torch.Generator().manual_seed(7)).to(dtype)
    for seed in range(4):
        token_rules = random_rules(seed, depth, len(counts), num_layers=3)
        changes = cpu.step_changes(token_rules, *step, directions)
        assert changes is not None
        out = empty_map(3, depth, len(before))
        torch_gather.map_tokens(token_rules, *step, out)
        for layer, added in enumerate(by_reference(token_rules, step, directions)):
            result, mapped = before.clone(), before.clone()
            changes.add_(result, layer)
            torch_gather.steer_tokens_(mapped, None, directions, layer, out, depth)
            assert torch.equal(result, mapped)
            if dtype == torch.float32:
                expected = before.double() + added
                assert (
                    (result.double() - expected).abs() <= 2.0**-22 * (expected.abs() + 40)
                ).all()


def test_the_cpu_backend_detects_a_step_without_changes() -> None:
    token_rules = rules(
        direction_start=[[1, 5]], begin=[[4, 0]], end=[[9, FOREVER]], strength=[[1.0, 0.0]]
    )
    changes = cpu.step_changes(token_rules, *tokens_of([1, 1], [3, 3]), random_directions(1))
    assert changes is not None and not changes
    changes = cpu.step_changes(token_rules, *tokens_of([1, 1], [4, 3]), random_directions(1))
    assert changes


def test_the_cpu_backend_reads_the_strengths_at_the_start_of_a_step() -> None:
    token_rules = rules(
        direction_start=[[2]], end=[[FOREVER]], pool_offset=[[0]], strength_pool=[0.5, 0.25]
    )
    directions, hidden = random_directions(1), torch.zeros(1, 6)
    for strength in (0.25, -3.0):
        token_rules.strength_pool[1] = strength
        changes = cpu.step_changes(token_rules, *tokens_of([1], [1]), directions)
        assert changes is not None
        changes.add_(hidden.zero_(), 0)
        torch.testing.assert_close(hidden[0], strength * directions.vectors[0, 2])


def test_the_cpu_backend_leaves_rotations_and_large_steps_to_the_map() -> None:
    token_rules = rules(direction_start=[[2]], end=[[5]], strength=[[1.0]])
    turning = random_directions(1, is_rotation=1.0)
    assert cpu.step_changes(token_rules, *tokens_of([1], [4]), turning) is None
    assert (
        cpu.step_changes(token_rules, *tokens_of([1], [5]), turning) is not None
    )  # has no strength
    assert (
        cpu.step_changes(token_rules, *tokens_of([1], [4]), random_directions(1, is_rotation=0.0))
        is not None
    )
    wide = Directions(torch.zeros(1, 80, 2**18), None)
    assert cpu.step_changes(token_rules, *tokens_of([4], [0]), wide) is not None
    assert cpu.step_changes(token_rules, *tokens_of([5], [0]), wide) is None


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_cpu_has_its_own_backend(kernels: str) -> None:
    assert guidance_backend(kernels, torch.device("cpu")) is cpu
    assert guidance_backend("torch", torch.device("cuda")) is torch_gather
