"""From doses to rules: the direction and strength of each token."""

from typing import Any

import pytest
import torch
from guidance import delta, vector
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from vllm_steer.bank import SiteTable
from vllm_steer.bank.layers import fill_layer_bank
from vllm_steer.doses import PHASES, Dose, Dynamic, TokenWindows, token_spans
from vllm_steer.kernels.guidance import GuidanceBackend, TokenMap, reference, torch_gather
from vllm_steer.serving.placeholders import placeholder_bounds
from vllm_steer.serving.step import SteeredRequest
from vllm_steer.serving.token_rules import guidance_rules
from vllm_steer.steers.schedules import SCHEDULES

CPU = torch.device("cpu")
FOREVER = torch.iinfo(torch.int64).max
NO_HISTORY = torch.zeros(1)
STEERS = {
    "push": vector((0, 1, 3), site="attn_in"),
    "spin": vector((1,), site="attn_in", mode="rotate", seed=1),
    "walk": delta(4, (0, 3), site="attn_in"),
    "step": delta(1, (1, 3), site="attn_in", seed=1),
}


def table(*layers: int) -> SiteTable:
    """The one table of a rank with ``layers``."""
    bank = fill_layer_bank(STEERS, layers=layers, device=CPU, project=lambda _, rows: rows)
    (only,) = bank.tables
    return only


def rules_of(doses: dict[str, tuple[Dose, ...]], on: SiteTable, prompt_len: int = 3) -> Any:
    requests = {r: SteeredRequest(d, prompt_len) for r, d in doses.items() if d}
    return guidance_rules(list(doses), requests, on, NO_HISTORY)


@pytest.mark.parametrize(
    ("phase", "span"),
    [
        ("all", (0, FOREVER)),
        ("prompt", (0, 7)),
        ("generation", (7, FOREVER)),
        ("text", (0, FOREVER)),
        ("answer", (6, FOREVER)),
        ("last", (6, 7)),
    ],
)
def test_a_vector_acts_in_its_phase(phase: Any, span: tuple[int, int]) -> None:
    assert token_spans(Dose("v", 1.0, phase=phase), None, 7) == (span,)


@pytest.mark.parametrize(
    ("schedule", "phase", "span"),
    [
        ("fixed", "all", (6, 11)),
        ("fixed", "prompt", (6, 7)),
        ("fixed", "generation", (7, 11)),
        ("dim", "all", (6, 11)),
        ("dim", "prompt", (6, 7)),
        ("dim", "generation", (7, 11)),
        ("start", "all", (6, 7)),
        ("start", "prompt", (6, 7)),
    ],
)
def test_a_delta_begins_at_the_last_prompt_token(
    schedule: Any, phase: Any, span: tuple[int, int]
) -> None:
    assert token_spans(Dose("d", 1.0, phase=phase, schedule=schedule), 5, 7) == (span,)


@pytest.mark.parametrize(
    ("phase", "steps", "span"),
    [
        ("all", None, (0, FOREVER)),
        ("prompt", None, (0, 1)),
        ("generation", None, (1, FOREVER)),
        ("all", 3, (0, 3)),
        ("prompt", 3, (0, 1)),
        ("generation", 3, (1, 3)),
    ],
)
def test_a_prompt_of_one_token_is_its_own_last(
    phase: Any, steps: int | None, span: tuple[int, int]
) -> None:
    schedule: Any = None if steps is None else "fixed"
    assert token_spans(Dose("x", 1.0, phase=phase, schedule=schedule), steps, 1) == (span,)


@pytest.mark.parametrize(
    ("windows", "spans"),
    [
        (TokenWindows(prompt=((-4, None),)), ((3, 7),)),
        (TokenWindows(prompt=((0, 2), (-2, None))), ((0, 2), (5, 7))),
        (TokenWindows(prompt=((-40, 3),)), ((0, 3),)),
        (TokenWindows(prompt=((7, 9),)), ()),
        (TokenWindows(answer=((0, 8),)), ((6, 14),)),
        (TokenWindows(answer=((None, None),)), ((6, FOREVER),)),
        (TokenWindows(answer=((2, 3), (5, None))), ((8, 9), (11, FOREVER))),
        (TokenWindows(prompt=((-4, None),), answer=((0, 8),)), ((3, 14),)),
        (TokenWindows(prompt=((-4, -1),), answer=((0, 1),)), ((3, 7),)),
        (TokenWindows(prompt=((1, 3),), answer=((1, 2),)), ((1, 3), (7, 8))),
        (TokenWindows(prompt=((4, -4),)), ()),
    ],
)
def test_windows_count_from_both_ends_of_the_prompt(
    windows: TokenWindows, spans: tuple[tuple[int, int], ...]
) -> None:
    assert token_spans(Dose("v", 1.0, phase=windows), None, 7) == spans


def test_a_delta_acts_in_those_of_its_steps_that_a_window_has() -> None:
    windows = TokenWindows(prompt=((0, 2),), answer=((1, 2), (3, 9)))
    dose = Dose("d", 1.0, phase=windows, schedule="fixed")
    assert token_spans(dose, 5, 7) == ((7, 8), (9, 11))


def test_rules_are_indexed_by_dose_and_row() -> None:
    on = table(0, 1, 2, 3)
    assert on.layers == (0, 1, 3)
    assert {n: (e.start, e.steps) for n, e in on.entries.items()} == {
        "push": (1, None), "spin": (2, None), "step": (3, 1), "walk": (4, 4),
    }  # fmt: skip
    token_rules = rules_of(
        {
            "a": (Dose("walk", 2.0, schedule="dim"), Dose("push", -1.5, layers=(3,))),
            "b": (),
            "c": (Dose("push", 0.5, phase="generation"),),
        },
        on,
    )
    assert token_rules.direction_start.tolist() == [[4, 0, 1], [1, 0, 0]]
    assert token_rules.direction_stride.tolist() == [[1, 0, 0], [0, 0, 0]]
    assert token_rules.step0_position.tolist() == [[2, 0, 2], [2, 0, 0]]
    assert token_rules.begin.tolist() == [[[2, 0, 3], [0, 0, 0]]]
    assert token_rules.end.tolist() == [[[6, 0, FOREVER], [FOREVER, 0, 0]]]
    assert token_rules.strength.tolist() == [[2.0, 0, 0.5], [-1.5, 0, 0]]
    assert token_rules.slope.tolist() == [[0.25, 0, 0], [0, 0, 0]]
    assert token_rules.layers.tolist() == [
        [[1, 0, 1], [0, 0, 0]],
        [[0, 0, 1], [0, 0, 0]],
        [[1, 0, 1], [1, 0, 0]],
    ]
    assert {t.dtype for t in (token_rules.direction_start, token_rules.end)} == {torch.int64}
    assert {t.dtype for t in (token_rules.strength, token_rules.slope, token_rules.layers)} == {
        torch.float32
    }


def test_a_rank_with_some_layers_keeps_their_indices() -> None:
    on = table(2, 3)
    assert on.layers == (3,)
    token_rules = rules_of(
        {"a": (Dose("spin", 1.0), Dose("push", 2.0)), "b": (Dose("walk", 3.0),)}, on
    )
    assert token_rules.layers.tolist() == [[[0, 1], [1, 0]]]
    narrowed = rules_of({"a": (Dose("push", 2.0, layers=(0, 1)),)}, on)
    assert narrowed.layers.tolist() == [[[0]]]


def test_a_batch_without_doses_at_the_site_has_no_rules() -> None:
    on = table(0, 1, 2, 3)
    for doses in ({}, {"a": ()}, {"a": (Dose("elsewhere", 1.0),), "b": ()}):
        token_rules = rules_of(doses, on)
        assert token_rules.direction_start.shape == (0, len(doses))
        assert token_rules.layers.shape == (3, 0, len(doses))


def test_doses_of_other_sites_and_of_waiting_requests_take_no_depth() -> None:
    on = table(0, 1, 2, 3)
    many = tuple(Dose("push", 1.0, layers=(layer,)) for layer in (0, 1, 3))
    requests = {
        "here": SteeredRequest((Dose("elsewhere", 9.0), Dose("push", 2.0)), 3),
        "waits": SteeredRequest(many, 3),
    }
    token_rules = guidance_rules(["other", "here"], requests, on, NO_HISTORY)
    assert token_rules.direction_start.tolist() == [[0, 1]]
    assert token_rules.strength.tolist() == [[0, 2.0]]


def test_the_cache_between_batches_changes_no_rule() -> None:
    """With requests that join, leave and wait, and reused ids with equal and other doses."""
    on = table(0, 1, 2, 3)
    memo: dict[str, Any] = {}
    push, walk = (Dose("push", 2.0),), (Dose("walk", 1.0, schedule="dim"), Dose("spin", 3.0))
    batches: list[tuple[list[str], dict[str, SteeredRequest]]] = [
        (["a", "b", "x"], {"a": SteeredRequest(push, 3), "b": SteeredRequest(walk, 3)}),
        (["b", "a"], {"a": SteeredRequest(walk, 3), "b": SteeredRequest(walk, 5)}),
        (["x"], {"a": SteeredRequest(push, 3)}),
        (["b", "a"], {"a": SteeredRequest((Dose("elsewhere", 1.0),), 3)}),
        (["a", "b"], {"a": SteeredRequest(push, 1), "b": SteeredRequest(push, 1)}),
        (["a"], {}),
    ]
    for req_ids, requests in batches:
        for _ in range(2):
            again = guidance_rules(req_ids, requests, on, NO_HISTORY, memo)
            anew = guidance_rules(req_ids, requests, on, NO_HISTORY)
            assert all(
                torch.equal(getattr(again, name), tensor)
                for name, tensor in vars(anew).items()
                if tensor is not None
            )
            assert memo.keys() <= requests.keys()


@pytest.mark.parametrize("backend", [reference, torch_gather], ids=["reference", "torch"])
def test_a_dynamic_dose_takes_the_strength_of_its_tokens_step(backend: GuidanceBackend) -> None:
    """A vector and a delta of four steps from the last prompt token on, beside a fixed dose."""
    on = table(0, 1, 2, 3)
    dynamic: Any = {"phase": "answer", "dynamic": Dynamic()}
    doses = (
        Dose("push", 2.0, **dynamic),
        Dose("walk", -2.0, layers=(3,), schedule="dim", **dynamic),
        Dose("spin", 0.5),
    )
    history = torch.arange(100, 160, dtype=torch.float32)
    requests = {"a": SteeredRequest(doses, 3, {0: 10, 1: 40})}
    token_rules = guidance_rules(["x", "a"], requests, on, history)
    assert token_rules.strength_pool is history
    assert token_rules.pool_offset.tolist() == [[-1, 10], [-1, 40], [-1, -1]]
    positions = torch.tensor([0, 1, 0, 1, 2, 3, 4, 5, 6, 7])
    out = TokenMap(torch.zeros(3, 10, dtype=torch.int32), torch.zeros(3, 3, 10))
    backend.map_tokens(token_rules, torch.tensor([0, 2, 10]), positions, out)
    pushed = [0.0] * 4 + [110.0, 111.0, 112.0, 113.0, 114.0, 115.0]
    walked = [0.0] * 4 + [140.0, 141.0, 142.0, 143.0, 0.0, 0.0]
    spun = [0.0] * 2 + [0.5] * 8
    none = [0.0] * 10
    assert out.strengths.tolist() == [
        [pushed, none, none],
        [pushed, none, spun],
        [pushed, walked, none],
    ]
    start = on.entries["walk"].start
    assert out.directions[1, 4:8].tolist() == [start, start + 1, start + 2, start + 3]


@pytest.mark.parametrize("strength", [3.4028234e38, -1e-45, 1e-60])
def test_a_strength_is_float32_without_a_warning(strength: float) -> None:
    token_rules = rules_of({"a": (Dose("push", strength),)}, table(0))
    assert token_rules.strength.item() == torch.tensor(strength, dtype=torch.float32).item()


def expected(
    dose: Dose, position: int, prompt_len: int, is_placeholder: bool = False
) -> tuple[int, float]:
    """The expected step and strength of one token, from its definition; step -1 for none."""
    steer = STEERS[dose.steer]
    is_prompt = position < prompt_len
    if dose.phase == ("generation" if is_prompt else "prompt"):
        return -1, 0.0
    if dose.phase == "text" and is_placeholder:
        return -1, 0.0
    if dose.phase == "answer" and position < prompt_len - 1:
        return -1, 0.0
    if dose.phase == "last" and position != prompt_len - 1:
        return -1, 0.0
    if isinstance(dose.phase, TokenWindows) and not any(
        position in range(prompt_len)[slice(*bounds)] for bounds in dose.phase.prompt
    ):
        answer = range(prompt_len - 1, 10**6)
        if not any(position in answer[slice(*bounds)] for bounds in dose.phase.answer):
            return -1, 0.0
    if steer.kind == "vector":
        return 0, dose.strength
    step = position - prompt_len + 1
    if not 0 <= step < steer.steps or (dose.schedule == "start" and step > 0):
        return -1, 0.0
    falls = dose.schedule == "dim"
    return step, dose.strength * ((steer.steps - step) / steer.steps if falls else 1)


def bounds_between(low: int, high: int) -> st.SearchStrategy[tuple[tuple[int | None, ...], ...]]:
    """Up to two slices."""
    index = st.none() | st.integers(low, high)
    return st.lists(st.tuples(index, index), max_size=2).map(tuple)


windows = st.builds(TokenWindows, prompt=bounds_between(-5, 5), answer=bounds_between(0, 6))
doses = st.builds(
    lambda steer, phase, schedule, narrow, strength: Dose(
        steer,
        strength,
        layers=STEERS[steer].layers[:1] if narrow else None,
        phase=phase,
        schedule=schedule if STEERS[steer].kind == "delta" else None,
    ),
    st.sampled_from(sorted(STEERS)),
    st.one_of(st.sampled_from(PHASES), windows),
    st.sampled_from(SCHEDULES),
    st.booleans(),
    st.floats(-9, 9, width=32).filter(bool),
)


def features_of(placeholders: list[bool]) -> list[MultiModalFeatureSpec]:
    """One item over the whole prompt, of which these tokens stand for embeddings."""
    position = PlaceholderRange(0, len(placeholders), is_embed=torch.tensor(placeholders))
    return [MultiModalFeatureSpec(None, "image", "hash", position)]


Prompt = list[bool]  # which tokens are placeholders


@pytest.mark.parametrize("backend", [reference, torch_gather], ids=["reference", "torch"])
@settings(max_examples=60, deadline=None)
@given(
    batch=st.lists(
        st.tuples(
            st.lists(doses, max_size=4),
            st.lists(st.booleans(), min_size=1, max_size=9),
            st.integers(0, 4),
            st.integers(0, 9),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_every_token_of_every_request_gets_the_strengths_of_its_doses(
    backend: GuidanceBackend, batch: list[tuple[list[Dose], Prompt, int, int]]
) -> None:
    """All tokens from some token on, prompt and generation, in one step."""
    on = table(0, 1, 2, 3)
    requests = {
        str(i): SteeredRequest(
            tuple(d), len(p), placeholders=placeholder_bounds(d, features_of(p), len(p))
        )
        for i, (d, p, _, _) in enumerate(batch)
        if d
    }
    computed = [min(done, len(prompt) + generated - 1) for _, prompt, generated, done in batch]
    ends = [len(prompt) + generated for _, prompt, generated, _ in batch]
    spans = [range(begin, max(end, begin)) for begin, end in zip(computed, ends, strict=True)]
    starts = torch.tensor([0, *map(len, spans)]).cumsum(0)
    positions = torch.tensor([position for span in spans for position in span])
    token_rules = guidance_rules([str(i) for i in range(len(batch))], requests, on, NO_HISTORY)
    depth = token_rules.direction_start.shape[0]
    assert depth == max(len(d) for d, _, _, _ in batch)
    if depth == 0:
        return
    out = TokenMap(
        torch.full((depth, len(positions)), -1, dtype=torch.int32),
        torch.full((3, depth, len(positions)), torch.nan),
    )
    backend.map_tokens(token_rules, starts, positions, out)
    for row, (dose, prompt, _, _) in enumerate(batch):
        for token, position in enumerate(spans[row], int(starts[row])):
            is_placeholder = position < len(prompt) and prompt[position]
            for k in range(depth):
                step, strength = -1, 0.0
                if k < len(dose):
                    step, strength = expected(dose[k], position, len(prompt), is_placeholder)
                layers = dose[k].layers or STEERS[dose[k].steer].layers if k < len(dose) else ()
                if strength:
                    start = on.entries[dose[k].steer].start
                    assert out.directions[k, token] == start + step
                for index, layer in enumerate(on.layers):
                    expected_strength = strength if layer in layers else 0.0
                    assert abs(out.strengths[index, k, token].item() - expected_strength) <= 1e-5
                    assert expected_strength or out.strengths[index, k, token] == 0
