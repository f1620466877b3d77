"""From rules to the map of a step's tokens: both forms against a loop over tokens."""

from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from vllm_steer.kernels.dispatch import guidance_form
from vllm_steer.kernels.guidance import Directions, Rules, TokenMap, gather, host, reference

FOREVER = torch.iinfo(torch.int64).max
EPS = torch.finfo(torch.float32).eps

forms = pytest.mark.parametrize("form", [reference, gather], ids=["reference", "torch"])


def rules(
    layers: int = 1, history: Sequence[float] = (0.0,), **fields: Sequence[Sequence[float]]
) -> Rules:
    """Rules ``[K, R]`` from lists; a field that is not named is zero, layers are all on.

    Tables that are not named are not there.
    """
    shape = (len(fields["start"]), len(fields["start"][0]))
    floats = {"strength", "slope"}
    names = ("start", "stride", "origin", "first", "last", "strength", "slope")
    tensors: dict[str, Any] = {
        name: torch.tensor(
            fields[name], dtype=torch.float32 if name in floats else torch.int64
        ).view(shape)
        if name in fields
        else torch.zeros(shape, dtype=torch.float32 if name in floats else torch.int64)
        for name in names
    }
    tables = torch.tensor(fields.get("table", [[-1] * shape[1]] * shape[0])).view(shape)
    ones = torch.ones(layers, *shape)
    return Rules(**tensors, layers=ones, table=tables, history=torch.tensor(history))


def empty_map(num_layers: int, depth: int, room: int) -> TokenMap:
    """Buffers of marks: an entry that was not written shows."""
    return TokenMap(
        torch.full((depth, room), -9, dtype=torch.int32),
        torch.full((num_layers, depth, room), -9.0),
    )


def tokens_of(
    counts: Sequence[int], starts: Sequence[int], dtype: torch.dtype = torch.int32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each request's first token ``[R + 1]``, and the position of every token."""
    ends = torch.tensor([0, *counts]).cumsum(0).to(dtype)
    positions = [start + i for start, n in zip(starts, counts, strict=True) for i in range(n)]
    return ends, torch.tensor(positions, dtype=torch.int64)


def random_rules(seed: int, depth: int, num_requests: int, num_layers: int) -> Rules:
    """Vectors and deltas in turn, some without a dose, some in a part of the layers.

    About half take their strengths from a history, which ends before some of their steps.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (depth, num_requests)

    def integers(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    first, length = integers(0, 12), integers(0, 9)
    last = torch.where(integers(0, 3) == 0, FOREVER, first + length)
    there = (integers(0, 4) > 0).float()
    return Rules(
        start=integers(1, 40),
        stride=integers(0, 2),
        origin=first - integers(0, 2),
        first=first,
        last=last,
        strength=torch.randn(shape, generator=generator) * there,
        slope=torch.rand(shape, generator=generator) * integers(0, 2),
        layers=torch.randint(0, 2, (num_layers, *shape), generator=generator).float(),
        table=integers(-15, 15).clamp(min=-1),
        history=torch.randn(16, generator=generator),
    )


def subset(given: Rules, at: Any) -> Rules:
    """The rules ``at`` an index of the last dimensions; the history is of all."""
    return Rules(
        **{
            name: tensor if name == "history" else tensor[..., *at]
            for name, tensor in vars(given).items()
        }
    )


def assert_mapped(
    given: Rules, counts: Sequence[int], starts: Sequence[int], out: TokenMap
) -> None:
    """Every entry is what the equations say in Python's numbers, and the room is untouched."""
    token = 0
    for row, (count, start) in enumerate(zip(counts, starts, strict=True)):
        for position in range(start, start + count):
            for k in range(given.start.shape[0]):
                at = {
                    name: getattr(given, name)[k, row].item()
                    for name in vars(given)
                    if name not in ("layers", "history")
                }
                i = position - at["origin"]
                acts = at["first"] <= position < at["last"]
                direction = at["start"] + at["stride"] * i if acts else 0
                strength = at["strength"] * (1 - at["slope"] * i) if acts else 0.0
                if at["table"] >= 0 and acts:
                    inside = 0 <= at["table"] + i < len(given.history)
                    strength = given.history[at["table"] + i].item() if inside else 0.0
                assert out.directions[k, token] == direction
                allowed = 4 * EPS * abs(at["strength"]) * (1 + abs(at["slope"] * i))
                for layer in range(given.layers.shape[0]):
                    wanted = strength * given.layers[layer, k, row].item()
                    assert abs(out.strengths[layer, k, token].item() - wanted) <= allowed
            token += 1
    assert (out.directions[:, token:] == -9).all()
    assert (out.strengths[:, :, token:] == -9).all()


@forms
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
def test_every_token_takes_what_its_requests_rule_says(
    form: ModuleType, depth: int, counts: list[int], starts: list[int], dtype: torch.dtype
) -> None:
    for seed in range(3):
        given = random_rules(seed, depth, len(counts), num_layers=3)
        out = empty_map(3, depth, sum(counts) + 2)
        form.map_tokens(given, *tokens_of(counts, starts, dtype), out)
        assert_mapped(given, counts, starts, out)


@forms
@pytest.mark.parametrize("depth", [1, 3])
def test_a_step_without_tokens_writes_nothing(form: ModuleType, depth: int) -> None:
    out = empty_map(2, depth, 4)
    given = random_rules(0, depth, 2, num_layers=2)
    form.map_tokens(given, *tokens_of([0, 0], [0, 0]), out)
    assert_mapped(given, [0, 0], [0, 0], out)


@forms
def test_a_delta_walks_its_steps_from_the_last_prompt_token(form: ModuleType) -> None:
    """Prompt of 3, 4 steps from direction 6 on, falling: the span is [2, 6)."""
    given = rules(
        start=[[6]],
        stride=[[1]],
        origin=[[2]],
        first=[[2]],
        last=[[6]],
        strength=[[2.0]],
        slope=[[0.25]],
    )
    out = empty_map(1, 1, 8)
    form.map_tokens(given, *tokens_of([8], [0]), out)
    assert out.directions.tolist() == [[0, 0, 6, 7, 8, 9, 0, 0]]
    assert out.strengths.tolist() == [[[0, 0, 2.0, 1.5, 1.0, 0.5, 0, 0]]]


@forms
def test_a_chunk_or_a_recomputed_stretch_maps_like_the_whole(form: ModuleType) -> None:
    given = random_rules(4, 2, 1, num_layers=2)
    whole, parts = empty_map(2, 2, 20), empty_map(2, 2, 20)
    form.map_tokens(given, *tokens_of([20], [0]), whole)
    for start, stop in [(0, 7), (7, 8), (8, 19), (19, 20)]:
        part = TokenMap(parts.directions[:, start:], parts.strengths[:, :, start:])
        form.map_tokens(given, *tokens_of([stop - start], [start]), part)
    assert torch.equal(parts.directions, whole.directions)
    assert torch.equal(parts.strengths, whole.strengths)


@forms
@pytest.mark.parametrize("strength", [3e38, -3e38, 1e37, 1e-45], ids=str)
def test_a_token_outside_the_span_takes_nothing_however_far_and_strong(
    form: ModuleType, strength: float
) -> None:
    """The falling line of a delta reaches beyond float32 a long prompt before its first step."""
    given = rules(
        start=[[1]],
        stride=[[1]],
        origin=[[100_000]],
        first=[[100_000]],
        last=[[100_005]],
        strength=[[strength]],
        slope=[[0.2]],
    )
    out = empty_map(1, 1, 4)
    positions = torch.tensor([0, 99_999, 100_000, 100_005])
    form.map_tokens(given, torch.tensor([0, 4]), positions, out)
    assert out.directions.tolist() == [[0, 0, 1, 0]]
    assert out.strengths[0, 0].tolist() == [0, 0, torch.tensor(strength).item(), 0]


@forms
def test_positions_beyond_32_bits_are_told_apart(form: ModuleType) -> None:
    edge = 2**32 + 5
    given = rules(start=[[3, 3]], strength=[[1.5, 2.5]], first=[[0, edge]], last=[[edge, FOREVER]])
    out = empty_map(1, 1, 4)
    positions = torch.tensor([edge - 1, edge, edge - 1, edge])
    form.map_tokens(given, torch.tensor([0, 2, 4]), positions, out)
    assert out.directions.tolist() == [[3, 0, 0, 3]]
    assert out.strengths[0, 0].tolist() == [1.5, 0, 0, 2.5]


@forms
def test_a_dose_acts_in_its_layers_only(form: ModuleType) -> None:
    given = rules(layers=3, start=[[2], [4]], last=[[FOREVER], [FOREVER]], strength=[[1.0], [2.0]])
    given.layers[:, 0, 0] = torch.tensor([1.0, 0, 1])
    given.layers[:, 1, 0] = torch.tensor([0.0, 1, 0])
    out = empty_map(3, 2, 1)
    form.map_tokens(given, *tokens_of([1], [9]), out)
    assert out.directions[:, 0].tolist() == [2, 4]
    assert out.strengths[:, :, 0].tolist() == [[1, 0], [0, 2], [1, 0]]


@forms
def test_rules_and_buffers_may_be_views(form: ModuleType) -> None:
    given = random_rules(2, 4, 3, num_layers=3)
    half = subset(given, (slice(None, None, 2), slice(None)))
    whole = empty_map(3, 4, 9)
    front = TokenMap(whole.directions[:2], whole.strengths[:, :2])
    form.map_tokens(half, *tokens_of([2, 3, 1], [0, 5, 2]), front)
    assert_mapped(half, [2, 3, 1], [0, 5, 2], front)
    assert (whole.directions[2:] == -9).all()
    assert (whole.strengths[:, 2:] == -9).all()


@forms
def test_permuted_requests_give_permuted_maps(form: ModuleType) -> None:
    given = random_rules(8, 2, 4, num_layers=2)
    order = [2, 0, 3, 1]
    permuted = subset(given, (order,))
    starts = [0, 6, 2, 9]
    one, other = empty_map(2, 2, 4), empty_map(2, 2, 4)
    form.map_tokens(given, *tokens_of([1] * 4, starts), one)
    form.map_tokens(permuted, *tokens_of([1] * 4, [starts[i] for i in order]), other)
    assert torch.equal(other.directions, one.directions[:, order])
    assert torch.equal(other.strengths, one.strengths[:, :, order])


@forms
def test_a_dose_with_a_history_takes_its_own_number_at_every_step(form: ModuleType) -> None:
    """Prompts of 3 and 2. A delta of 4 steps and a vector from the history, beside fixed ones."""
    given = rules(
        start=[[6, 20], [30, 31]],
        stride=[[1, 0], [0, 0]],
        origin=[[2, 1], [0, 0]],
        first=[[2, 1], [0, 0]],
        last=[[6, FOREVER], [FOREVER, 0]],
        strength=[[9.0, 9.0], [0.5, 9.0]],
        slope=[[0.25, 0], [0, 0]],
        table=[[1, 5], [-1, 0]],
        history=[99.0, 1.0, 1.5, 0.0, -2.0, 3.0, 4.0, 5.0],
    )
    out = empty_map(1, 2, 11)
    form.map_tokens(given, *tokens_of([7, 4], [0, 0]), out)
    assert out.directions.tolist() == [[0, 0, 6, 7, 8, 9, 0, 0, 20, 20, 20], [30] * 7 + [0] * 4]
    assert out.strengths.tolist() == [
        [[0, 0, 1.0, 1.5, 0.0, -2.0, 0, 0, 3.0, 4.0, 5.0], [0.5] * 7 + [0.0] * 4]
    ]


@forms
def test_a_chunk_may_span_many_steps_of_a_history(form: ModuleType) -> None:
    """A request that is computed again from the start takes the strengths that it had."""
    steps = [0.25 * step - 1 for step in range(12)]
    given = rules(
        start=[[1]],
        origin=[[3]],
        first=[[3]],
        last=[[FOREVER]],
        table=[[2]],
        history=[7, 7, *steps],
    )
    whole, parts = empty_map(1, 1, 15), empty_map(1, 1, 15)
    form.map_tokens(given, *tokens_of([15], [0]), whole)
    assert whole.strengths[0, 0].tolist() == [0, 0, 0, *steps]
    for start, stop in [(0, 2), (2, 9), (9, 10), (10, 15)]:
        part = TokenMap(parts.directions[:, start:], parts.strengths[:, :, start:])
        form.map_tokens(given, *tokens_of([stop - start], [start]), part)
    assert torch.equal(parts.strengths, whole.strengths)


@forms
@pytest.mark.parametrize("length", [1, 3])
def test_a_step_beyond_the_history_takes_nothing(form: ModuleType, length: int) -> None:
    """Numbers stand before and behind it in memory, and none of them may be read."""
    memory = torch.full((length + 8,), torch.nan)
    memory[4:-4] = torch.arange(1.0, length + 1)
    given = rules(
        start=[[1]],
        origin=[[2]],
        last=[[FOREVER]],
        table=[[0]],
        strength=[[3e38]],
        slope=[[1e30]],
    )
    given = replace(given, history=memory[4:-4])
    out = empty_map(1, 1, 9)
    positions = torch.tensor([0, 1, 2, 3, 4, 5, 6, 2**40, FOREVER - 1])
    form.map_tokens(given, torch.tensor([0, 9]), positions, out)
    taken = [float(step) if step <= length else 0.0 for step in range(1, 6)]
    assert out.strengths[0, 0].tolist() == [0, 0, *taken, 0, 0]


@forms
def test_what_a_history_holds_counts_when_the_map_is_made(form: ModuleType) -> None:
    given = rules(start=[[1]], last=[[FOREVER]], table=[[1]], history=[0.0] * 3)
    out = empty_map(1, 1, 2)
    for number in (1.5, -0.25):
        given.history[1:].fill_(number)
        form.map_tokens(given, *tokens_of([2], [0]), out)
        assert out.strengths[0, 0].tolist() == [number, number]


@forms
def test_a_number_that_is_not_finite_reaches_its_own_tokens_only(form: ModuleType) -> None:
    given = rules(
        start=[[1, 1]],
        last=[[2, FOREVER]],
        strength=[[1.0, 1.0]],
        table=[[0, -1]],
        history=[0.5, torch.nan, torch.nan],
    )
    out = empty_map(1, 1, 5)
    form.map_tokens(given, *tokens_of([3, 2], [0, 1]), out)
    assert out.strengths[0, 0, [0, 2, 3, 4]].tolist() == [0.5, 0, 1, 1]
    assert out.strengths[0, 0, 1].isnan()


def random_directions(num_layers: int, turns: float | None = None) -> Directions:
    vectors = torch.randn(num_layers, 80, 6, generator=torch.Generator().manual_seed(3))
    vectors[:, 0] = 0
    return Directions(vectors, None if turns is None else torch.full((80,), turns))


def by_reference(
    given: Rules, step: tuple[torch.Tensor, torch.Tensor], directions: Directions
) -> list[torch.Tensor]:
    """What the step adds to zeros in each layer, mapped and steered one token at a time."""
    num_layers, depth = given.layers.shape[:2]
    num_tokens = len(step[1])
    out = empty_map(num_layers, depth, num_tokens)
    reference.map_tokens(given, *step, out)
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
def test_the_host_adds_in_every_layer_what_the_map_would(
    counts: list[int], starts: list[int], depth: int, dtype: torch.dtype
) -> None:
    """Bit for bit: whether a step is mapped depends on who else is in it."""
    directions, step = random_directions(3), tokens_of(counts, starts)
    before = torch.randn(sum(counts), 6, generator=torch.Generator().manual_seed(7)).to(dtype)
    for seed in range(4):
        given = random_rules(seed, depth, len(counts), num_layers=3)
        changes = host.changes_of(given, *step, directions)
        assert changes is not None
        out = empty_map(3, depth, len(before))
        gather.map_tokens(given, *step, out)
        for layer, added in enumerate(by_reference(given, step, directions)):
            found, mapped = before.clone(), before.clone()
            changes.add_(found, layer)
            gather.steer_tokens_(mapped, None, directions, layer, out, depth)
            assert torch.equal(found, mapped)
            if dtype == torch.float32:
                wanted = before.double() + added
                assert ((found.double() - wanted).abs() <= 2.0**-22 * (wanted.abs() + 40)).all()


def test_the_host_knows_a_step_that_changes_nothing() -> None:
    given = rules(start=[[1, 5]], first=[[4, 0]], last=[[9, FOREVER]], strength=[[1.0, 0.0]])
    changes = host.changes_of(given, *tokens_of([1, 1], [3, 3]), random_directions(1))
    assert changes is not None and not changes
    changes = host.changes_of(given, *tokens_of([1, 1], [4, 3]), random_directions(1))
    assert changes


def test_the_host_reads_the_strengths_that_are_there_when_a_step_begins() -> None:
    given = rules(start=[[2]], last=[[FOREVER]], table=[[0]], history=[0.5, 0.25])
    directions, hidden = random_directions(1), torch.zeros(1, 6)
    for strength in (0.25, -3.0):
        given.history[1] = strength
        changes = host.changes_of(given, *tokens_of([1], [1]), directions)
        assert changes is not None
        changes.add_(hidden.zero_(), 0)
        torch.testing.assert_close(hidden[0], strength * directions.vectors[0, 2])


def test_the_host_leaves_turns_and_large_steps_to_the_map() -> None:
    given = rules(start=[[2]], last=[[5]], strength=[[1.0]])
    turning = random_directions(1, turns=1.0)
    assert host.changes_of(given, *tokens_of([1], [4]), turning) is None
    assert host.changes_of(given, *tokens_of([1], [5]), turning) is not None  # takes nothing
    assert host.changes_of(given, *tokens_of([1], [4]), random_directions(1, turns=0.0)) is not None
    wide = Directions(torch.zeros(1, 80, 2**18), None)
    assert host.changes_of(given, *tokens_of([4], [0]), wide) is not None
    assert host.changes_of(given, *tokens_of([5], [0]), wide) is None


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_the_host_has_a_form_of_its_own(kernels: str) -> None:
    assert guidance_form(kernels, torch.device("cpu")) is host
    assert guidance_form("torch", torch.device("cuda")) is gather
