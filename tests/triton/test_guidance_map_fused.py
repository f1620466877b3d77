"""The triton_fused backend maps tokens as ``reference`` does, one token and one dose at a time."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from vllm_steer.kernels.guidance import (
    PLACEHOLDER_STRIDE,
    TokenMap,
    TokenRules,
    reference,
    torch_gather,
    triton_fused,
    triton_map,
)

FOREVER = torch.iinfo(torch.int64).max


def given(rules: TokenRules) -> dict[str, torch.Tensor]:
    """The fields that are not None."""
    return {name: tensor for name, tensor in vars(rules).items() if tensor is not None}


def random_rules(
    num_requests: int, depth: int, num_layers: int, device: torch.device, seed: int = 0
) -> TokenRules:
    """Vectors and deltas, spans from everywhere to empty, falling strengths, a part of layers.

    About half take their strengths from a history, which ends before some of their steps.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (depth, num_requests)

    def integers(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    first, length = integers(0, 12), integers(0, 9)
    is_present = (integers(0, 4) > 0).float()
    rules = TokenRules(
        direction_start=integers(1, 40),
        direction_stride=integers(0, 2),
        step0_position=first - integers(0, 2),
        begin=torch.stack([first, first + length + 1]),  # a second span behind the first
        end=torch.stack(
            [
                torch.where(integers(0, 3) == 0, FOREVER, first + length),
                first + length + 1 + integers(0, 4),
            ]
        ),
        strength=torch.randn(shape, generator=generator) * is_present,
        slope=torch.rand(shape, generator=generator) * integers(0, 2),
        layers=torch.randint(0, 2, (num_layers, *shape), generator=generator).float(),
        pool_offset=integers(-15, 15).clamp(min=-1),
        strength_pool=torch.randn(16, generator=generator),
    )
    return TokenRules(**{name: tensor.to(device) for name, tensor in given(rules).items()})


def subset(token_rules: TokenRules, at: Any) -> TokenRules:
    """The rules ``at`` an index of the last dimensions; the history is of all."""
    return TokenRules(
        **{
            name: tensor if name == "strength_pool" else tensor[..., *at]
            for name, tensor in given(token_rules).items()
        }
    )


def one_rule(device: torch.device, **fields: float) -> TokenRules:
    """One request with one dose in one layer; a field that is not named is zero."""
    floats = {"strength", "slope"}
    tensors = {
        name: torch.full(
            (1, 1),
            fields.get(name, 0),
            dtype=torch.float32 if name in floats else torch.int64,
            device=device,
        )
        for name in (
            "direction_start",
            "direction_stride",
            "step0_position",
            "begin",
            "end",
            "strength",
            "slope",
        )
    }
    tensors |= {name: tensors[name][None] for name in ("begin", "end")}
    table = torch.full((1, 1), -1, device=device)
    ones = torch.ones(1, 1, 1, device=device)
    return TokenRules(**tensors, layers=ones, pool_offset=table, strength_pool=ones[0, 0])


def with_history(token_rules: TokenRules, begin: int, history: torch.Tensor) -> TokenRules:
    """The same, but for strengths from a history that begins at a place of ``history``."""
    return replace(
        token_rules,
        pool_offset=torch.full_like(token_rules.pool_offset, begin),
        strength_pool=history,
    )


def marked_map(num_layers: int, depth: int, max_tokens: int, device: torch.device) -> TokenMap:
    """Buffers filled with a marker, to detect entries that were not written."""
    return TokenMap(
        torch.full((depth, max_tokens), -9, dtype=torch.int32, device=device),
        torch.full((num_layers, depth, max_tokens), -9.0, device=device),
    )


def tokens_of(
    counts: Sequence[int],
    starts: Sequence[int],
    device: torch.device,
    dtype: torch.dtype = torch.int64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each request's first token, and the position of every token."""
    query_start_loc = torch.tensor([0, *counts]).cumsum(0).to(device, torch.int32)
    positions = [start + i for start, n in zip(starts, counts, strict=True) for i in range(n)]
    return query_start_loc, torch.tensor(positions, dtype=dtype, device=device)


def assert_mapped(
    token_rules: TokenRules, query_start_loc: torch.Tensor, positions: torch.Tensor, out: TokenMap
) -> None:
    """Check against ``reference`` in float64, within float32 rounding; unused entries are
    unchanged.
    """
    num_layers, depth, max_tokens = out.strengths.shape
    expected = TokenMap(
        torch.full((depth, max_tokens), -9, dtype=torch.int64),
        torch.full((num_layers, depth, max_tokens), -9.0, dtype=torch.float64),
    )
    on_host = TokenRules(**{name: tensor.cpu() for name, tensor in given(token_rules).items()})
    reference.map_tokens(on_host, query_start_loc.cpu(), positions.cpu(), expected)
    assert torch.equal(out.directions.cpu().long(), expected.directions)
    # Strengths are of order 1 and fall by up to 30 times themselves: a few roundings of that.
    torch.testing.assert_close(out.strengths.cpu().double(), expected.strengths, rtol=0, atol=9e-6)
    assert torch.equal(out.strengths.cpu() == 0, expected.strengths == 0)


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
    depth: int, counts: list[int], starts: list[int], dtype: torch.dtype, device: torch.device
) -> None:
    for seed in range(3):
        token_rules = random_rules(len(counts), depth, 3, device, seed)
        out = marked_map(3, depth, sum(counts) + 2, device)
        tokens = tokens_of(counts, starts, device, dtype)
        triton_fused.map_tokens(token_rules, *tokens, out)
        assert_mapped(token_rules, *tokens, out)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("counts", "starts"),
    [([1, 1, 1, 1], [6, 0, 19, 9]), ([13, 0, 22, 0], [0, 0, 0, 0]), ([4, 3, 1, 12], [3, 2, 2, 1])],
    ids=["single-tokens", "prefill", "chunks"],
)
def test_a_dose_of_text_leaves_out_placeholders(
    counts: list[int], starts: list[int], dtype: torch.dtype, device: torch.device
) -> None:
    ranges = [[(0, 3), (5, 6), (7, 12)], [], [(2, 20)], [(1, 2), (3, 4), (9, 14)]]
    bounds = [
        row * PLACEHOLDER_STRIDE + bound
        for row, of_request in enumerate(ranges)
        for pair in of_request
        for bound in pair
    ]
    for seed in range(4):
        plain = random_rules(4, 3, 2, device, seed)
        text_only = torch.randint(
            0, 2, (3, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.int64
        )
        token_rules = replace(
            plain,
            text_only=text_only.to(device),
            placeholder_bounds=torch.tensor(bounds, device=device),
        )
        tokens = tokens_of(counts, starts, device, dtype)
        out = marked_map(2, 3, sum(counts) + 2, device)
        triton_fused.map_tokens(token_rules, *tokens, out)
        assert_mapped(token_rules, *tokens, out)
        whole = marked_map(2, 3, sum(counts) + 2, device)
        triton_fused.map_tokens(plain, *tokens, whole)
        rows = [row for row, count in enumerate(counts) for _ in range(count)]
        for token, position in enumerate(tokens[1].tolist()):
            if any(begin <= position < end for begin, end in ranges[rows[token]]):
                whole.strengths[:, text_only[:, rows[token]].bool().to(device), token] = 0
        assert torch.equal(out.strengths, whole.strengths)


@pytest.mark.parametrize("num_requests", [*range(1, 10), 64, 65])
def test_each_token_is_mapped_to_its_request_among_any_number(
    num_requests: int, device: torch.device
) -> None:
    """Including requests without a token, at both ends and in between."""
    counts = [(0, 1, 3, 0, 2)[(i * 7 + num_requests) % 5] for i in range(num_requests)]
    expected = [i + 1 for i, count in enumerate(counts) for _ in range(count)]
    number = torch.arange(1, num_requests + 1, device=device)[None]
    nothing, ones = torch.zeros_like(number), torch.ones(1, num_requests, device=device)
    token_rules = TokenRules(
        direction_start=number,
        direction_stride=nothing,
        step0_position=nothing,
        begin=nothing[None],
        end=nothing[None] + FOREVER,
        strength=ones,
        slope=0 * ones,
        layers=ones[None],
        pool_offset=nothing - 1,
        strength_pool=ones[0],
    )
    out = marked_map(1, 1, len(expected) + 1, device)
    triton_fused.map_tokens(token_rules, *tokens_of(counts, [0] * num_requests, device), out)
    assert out.directions[0].tolist() == [*expected, -9]
    assert out.strengths[0, 0].tolist() == [1.0] * len(expected) + [-9.0]


def test_tokens_and_layers_beyond_one_program_are_mapped(device: torch.device) -> None:
    num_layers = 2 * triton_map.LAYERS + 1
    counts, starts = [triton_map.TOKENS + 3, 1, triton_map.TOKENS - 2], [0, 5, 2]
    token_rules = random_rules(3, 2, num_layers, device)
    token_rules.slope.zero_()  # in this many steps the falling line leaves the tolerance behind
    out = marked_map(num_layers, 2, sum(counts) + 2, device)
    tokens = tokens_of(counts, starts, device)
    triton_fused.map_tokens(token_rules, *tokens, out)
    assert_mapped(token_rules, *tokens, out)


def test_the_map_equals_the_torch_backend(device: torch.device) -> None:
    counts, starts = [9, 1, 0, 20], [0, 30, 0, 7]
    token_rules = random_rules(4, 3, 5, device, seed=3)
    tokens = tokens_of(counts, starts, device)
    out, plain = marked_map(5, 3, 32, device), marked_map(5, 3, 32, device)
    triton_fused.map_tokens(token_rules, *tokens, out)
    torch_gather.map_tokens(token_rules, *tokens, plain)
    assert torch.equal(out.directions, plain.directions)
    assert torch.equal(out.strengths, plain.strengths)


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("num_requests", [0, 2])
def test_a_step_without_tokens_writes_nothing(
    num_requests: int, depth: int, device: torch.device
) -> None:
    out = marked_map(2, depth, 4, device)
    token_rules = random_rules(num_requests, depth, 2, device)
    tokens = tokens_of([0] * num_requests, [0] * num_requests, device)
    triton_fused.map_tokens(token_rules, *tokens, out)
    assert_mapped(token_rules, *tokens, out)


def test_a_delta_walks_its_steps_from_the_last_prompt_token(device: torch.device) -> None:
    """Prompt of 3, 4 steps from direction 6 on, falling: the span is [2, 6)."""
    token_rules = one_rule(
        device,
        direction_start=6,
        direction_stride=1,
        step0_position=2,
        begin=2,
        end=6,
        strength=2.0,
        slope=0.25,
    )
    out = marked_map(1, 1, 8, device)
    triton_fused.map_tokens(token_rules, *tokens_of([8], [0], device), out)
    assert out.directions.tolist() == [[0, 0, 6, 7, 8, 9, 0, 0]]
    assert out.strengths.tolist() == [[[0, 0, 2.0, 1.5, 1.0, 0.5, 0, 0]]]


def test_a_chunk_and_a_recomputed_part_map_like_the_whole_prompt(device: torch.device) -> None:
    token_rules = random_rules(1, 2, 2, device, seed=4)
    whole, parts = marked_map(2, 2, 20, device), marked_map(2, 2, 20, device)
    triton_fused.map_tokens(token_rules, *tokens_of([20], [0], device), whole)
    for start, stop in [(0, 7), (7, 8), (8, 19), (19, 20)]:
        part = TokenMap(parts.directions[:, start:], parts.strengths[:, :, start:])
        triton_fused.map_tokens(token_rules, *tokens_of([stop - start], [start], device), part)
    assert torch.equal(parts.directions, whole.directions)
    assert torch.equal(parts.strengths, whole.strengths)


@pytest.mark.parametrize("strength", [3e38, -3e38, math.inf, 1e-45], ids=str)
def test_a_token_outside_the_span_gets_no_strength(strength: float, device: torch.device) -> None:
    """The falling line of a delta reaches beyond float32 a long prompt before its first step."""
    edge = 100_000
    token_rules = one_rule(
        device,
        direction_start=1,
        direction_stride=1,
        step0_position=edge,
        begin=edge,
        end=edge + 5,
        strength=strength,
        slope=0.2,
    )
    out = marked_map(1, 1, 4, device)
    positions = torch.tensor([0, edge - 1, edge, edge + 5], device=device)
    query_start_loc = torch.tensor([0, 4], dtype=torch.int32, device=device)
    triton_fused.map_tokens(token_rules, query_start_loc, positions, out)
    assert out.directions.tolist() == [[0, 0, 1, 0]]
    assert out.strengths[0, 0].tolist() == [0, 0, torch.tensor(strength).item(), 0]


def test_positions_beyond_32_bits_are_distinguished(device: torch.device) -> None:
    edge = 2**32 + 5
    token_rules = one_rule(
        device,
        direction_start=3 - edge,
        direction_stride=1,
        begin=edge,
        end=FOREVER,
        strength=1.5,
        slope=0.0,
    )
    out = marked_map(1, 1, 3, device)
    query_start_loc = torch.tensor([0, 3], dtype=torch.int32, device=device)
    positions = torch.tensor([5, edge - 1, edge + 1], device=device)
    triton_fused.map_tokens(token_rules, query_start_loc, positions, out)
    assert out.directions.tolist() == [[0, 0, 4]]
    assert out.strengths[0, 0].tolist() == [0, 0, 1.5]


def test_rules_and_buffers_may_be_views(device: torch.device) -> None:
    token_rules = random_rules(3, 4, 3, device, seed=2)
    half = subset(token_rules, (slice(None, None, 2), slice(None)))
    half = replace(
        half, strength_pool=torch.stack([half.strength_pool, -half.strength_pool], 1).flatten()[::2]
    )
    whole = marked_map(3, 4, 18, device)
    front = TokenMap(whole.directions[:2, ::2], whole.strengths[:, :2, ::2])
    query_start_loc, positions = tokens_of([2, 3, 1], [0, 5, 2], device)
    spread = torch.stack([positions, -positions], dim=1).flatten()[::2]
    triton_fused.map_tokens(half, query_start_loc, spread, front)
    assert_mapped(half, query_start_loc, positions, front)
    assert (whole.directions[2:] == -9).all() and (whole.directions[:, 1::2] == -9).all()
    assert (whole.strengths[:, 2:] == -9).all() and (whole.strengths[:, :, 1::2] == -9).all()


def test_permuted_requests_give_permuted_maps(device: torch.device) -> None:
    token_rules = random_rules(4, 2, 2, device, seed=8)
    order, starts = [2, 0, 3, 1], [0, 6, 2, 9]
    permuted = subset(token_rules, (order,))
    one, other = marked_map(2, 2, 4, device), marked_map(2, 2, 4, device)
    triton_fused.map_tokens(token_rules, *tokens_of([1] * 4, starts, device), one)
    triton_fused.map_tokens(
        permuted, *tokens_of([1] * 4, [starts[i] for i in order], device), other
    )
    assert torch.equal(other.directions, one.directions[:, order])
    assert torch.equal(other.strengths, one.strengths[:, :, order])


def test_a_chunk_may_span_many_steps_of_a_history(device: torch.device) -> None:
    """A delta of 9 steps from a prompt of 3, computed again in one go and in parts."""
    steps = [0.25 * step - 1 for step in range(9)]
    token_rules = one_rule(
        device,
        direction_start=4,
        direction_stride=1,
        step0_position=2,
        begin=2,
        end=11,
        strength=9.0,
        slope=0.1,
    )
    token_rules = with_history(token_rules, 2, torch.tensor([7, 7, *steps, 7, 7], device=device))
    whole, parts = marked_map(1, 1, 13, device), marked_map(1, 1, 13, device)
    triton_fused.map_tokens(token_rules, *tokens_of([13], [0], device), whole)
    assert whole.directions.tolist() == [[0, 0, *range(4, 13), 0, 0]]
    assert whole.strengths[0, 0].tolist() == [0, 0, *steps, 0, 0]
    for start, stop in [(0, 2), (2, 9), (9, 10), (10, 13)]:
        part = TokenMap(parts.directions[:, start:], parts.strengths[:, :, start:])
        triton_fused.map_tokens(token_rules, *tokens_of([stop - start], [start], device), part)
    assert torch.equal(parts.strengths, whole.strengths)


@pytest.mark.parametrize("length", [1, 3])
def test_a_step_beyond_the_history_gets_strength_zero(length: int, device: torch.device) -> None:
    """Numbers before and after it in memory must not be read."""
    memory = torch.full((length + 8,), math.nan, device=device)
    memory[4:-4] = torch.arange(1.0, length + 1, device=device)
    token_rules = one_rule(
        device, direction_start=1, step0_position=2, end=FOREVER, strength=3e38, slope=1e30
    )
    token_rules = with_history(token_rules, 0, memory[4:-4])
    out = marked_map(1, 1, 9, device)
    positions = torch.tensor([0, 1, 2, 3, 4, 5, 6, 2**40, FOREVER - 1], device=device)
    query_start_loc = torch.tensor([0, 9], dtype=torch.int32, device=device)
    triton_fused.map_tokens(token_rules, query_start_loc, positions, out)
    strengths = [float(step) if step <= length else 0.0 for step in range(1, 6)]
    assert out.strengths[0, 0].tolist() == [0, 0, *strengths, 0, 0]


def test_the_map_reads_the_history_when_it_is_made(device: torch.device) -> None:
    token_rules = with_history(
        one_rule(device, direction_start=1, end=FOREVER), 1, torch.zeros(3, device=device)
    )
    out = marked_map(1, 1, 2, device)
    for number in (1.5, -0.25):
        token_rules.strength_pool[1:].fill_(number)
        triton_fused.map_tokens(token_rules, *tokens_of([2], [0], device), out)
        assert out.strengths[0, 0].tolist() == [number, number]
