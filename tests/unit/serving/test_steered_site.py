"""A site's buffers over steps: a captured graph reads the doses of the current step only.

A graph replays on the whole of the buffers, deeper than the step and longer than its tokens; a
replay here is the same call with the same reach.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from guidance import WIDTH, delta, vector

from vllm_steer.bank import SiteTable
from vllm_steer.bank.layers import fill_layer_bank
from vllm_steer.doses import Dose
from vllm_steer.kernels.guidance import cpu, torch_gather
from vllm_steer.serving import mapped_site as site_module
from vllm_steer.serving.mapped_site import SiteLayer
from vllm_steer.serving.site import SteeredSite
from vllm_steer.serving.step import SteeredRequest, Step

CPU = torch.device("cpu")
MAX_DOSES, MAX_TOKENS = 3, 13
NO_HISTORY = torch.zeros(1)
LAYERS = (0, 2)
STEERS = {
    "push": vector((0, 2)),
    "spin": vector((2,), mode="rotate", seed=1),
    "walk": delta(3, (0, 2), site="resid", schedule="dim"),
}
BASE = torch.randn(MAX_TOKENS, WIDTH, generator=torch.Generator().manual_seed(2))


def table_of(steers: Mapping[str, Any] = STEERS) -> SiteTable:
    (table,) = fill_layer_bank(
        steers, layers=range(3), device=CPU, project=lambda _, rows: rows
    ).tables
    return table


@pytest.fixture(params=[torch_gather, cpu], ids=["map", "host"])
def site(request: pytest.FixtureRequest) -> SteeredSite:
    """A site in service."""
    backend = request.param
    site = SteeredSite(table_of(), backend, max_doses=MAX_DOSES, max_tokens=MAX_TOKENS, device=CPU)
    site.start_serving()
    return site


@dataclass(frozen=True)
class Part:
    """One request's tokens of a step: ``count`` of them from position ``start`` on."""

    req_id: str
    start: int
    count: int


def step_of(parts: Sequence[Part]) -> Step:
    counts = np.array([part.count for part in parts], dtype=np.int64)
    positions = [part.start + i for part in parts for i in range(part.count)]
    return Step(
        [part.req_id for part in parts],
        np.ones(len(parts), dtype=np.int64),
        counts,
        torch.tensor([0, *counts.cumsum()], dtype=torch.int32),
        torch.tensor(positions, dtype=torch.int64),
    )


def replay(site: SteeredSite, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The base rows of each layer after a graph that was captured at its full reach."""
    outputs = [BASE.clone() for _ in LAYERS]
    with monkeypatch.context() as patch:
        patch.setattr(site_module, "_capturing", lambda device: True)
        for layer, hidden in enumerate(outputs):
            site.steer_(hidden, None, layer)
    return outputs


def eager(site: SteeredSite, num_tokens: int) -> list[torch.Tensor]:
    outputs = [BASE[:num_tokens].clone() for _ in LAYERS]
    for layer, hidden in enumerate(outputs):
        site.steer_(hidden, None, layer)
    return outputs


def one_token(row: int, layer: int, doses: Sequence[Dose], prompt_len: int, position: int) -> Any:
    """A base row in float64 after its doses; None if none of them acts."""
    x = BASE[row].double()
    moved, acts, has_rotation = x.clone(), False, False
    for dose in doses:
        steer = STEERS[dose.steer]
        phase = "prompt" if position < prompt_len else "generation"
        if layer not in (dose.layers or steer.layers) or dose.phase not in ("all", phase):
            continue
        layer_index = steer.layers.index(layer)
        if steer.kind == "vector":
            w = steer.vectors[layer_index].double()
            has_rotation |= steer.mode == "rotate"
            w = w / w.norm() if steer.mode == "rotate" else w
            moved += dose.strength * w
        else:
            i = position - prompt_len + 1
            if not 0 <= i < steer.steps or (dose.schedule == "start" and i):
                continue
            falls = 1 - i / steer.steps if dose.schedule == "dim" else 1.0
            moved += dose.strength * falls * steer.delta[i, layer_index].double()
        acts = True
    if has_rotation:
        moved *= x.norm() / moved.norm()
    return moved if acts else None


def assert_steered(
    actual: Sequence[torch.Tensor], parts: Sequence[Part], requests: Mapping[str, SteeredRequest]
) -> None:
    """Check that each row has the doses of its own request; other rows are unchanged."""
    owners = [(part.req_id, part.start + i) for part in parts for i in range(part.count)]
    for layer, hidden in zip(LAYERS, actual, strict=True):
        for row in range(len(hidden)):
            expected = None
            if row < len(owners) and (request := requests.get(owners[row][0])):
                expected = one_token(row, layer, request.doses, request.prompt_len, owners[row][1])
            if expected is None:
                assert torch.equal(hidden[row], BASE[row])
            else:
                torch.testing.assert_close(hidden[row].double(), expected, rtol=1e-5, atol=1e-5)


PUSH, SPIN = Dose("push", 2.0), Dose("spin", -3.0)
WALK = Dose("walk", 4.0, schedule="dim")
A = SteeredRequest((PUSH, SPIN, WALK), prompt_len=4)
B = SteeredRequest((SPIN,), prompt_len=1)


def serve(
    site: SteeredSite,
    monkeypatch: pytest.MonkeyPatch,
    parts: Sequence[Part],
    requests: Mapping[str, SteeredRequest],
) -> None:
    """Run one step and check it for a graph replay and for an eager pass.

    The cpu has no graphs.
    """
    site.begin_step()
    site.prepare(step_of(parts), requests, NO_HISTORY)
    if site._backend is cpu:
        assert_steered(eager(site, sum(part.count for part in parts)), parts, requests)
        return
    replayed = replay(site, monkeypatch)
    assert_steered(replayed, parts, requests)
    num_tokens = sum(part.count for part in parts)
    for one, other in zip(eager(site, num_tokens), replayed, strict=True):
        assert torch.equal(one, other[:num_tokens])


def test_a_long_deep_step_does_not_change_a_short_shallow_one(
    site: SteeredSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(site, monkeypatch, [Part("a", 0, 13)], {"a": A})
    serve(site, monkeypatch, [Part("b", 5, 1)], {"b": B})
    serve(site, monkeypatch, [Part("a", 0, 13)], {"a": A})


def test_a_shallow_step_in_between_does_not_change_a_deep_one(
    site: SteeredSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(site, monkeypatch, [Part("a", 0, 9)], {"a": A})
    serve(site, monkeypatch, [Part("b", 0, 13)], {"b": B})
    serve(site, monkeypatch, [Part("a", 9, 1), Part("b", 13, 1)], {"a": A, "b": B})


def test_an_unsteered_batch_between_two_steered_ones_is_untouched(
    site: SteeredSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = {"a": A}
    serve(site, monkeypatch, [Part("a", 0, 6), Part("x", 0, 7)], requests)
    serve(site, monkeypatch, [Part("x", 7, 1), Part("y", 0, 12)], requests)
    serve(site, monkeypatch, [Part("a", 6, 1), Part("x", 8, 1)], requests)


def test_an_idle_site_changes_nothing(site: SteeredSite, monkeypatch: pytest.MonkeyPatch) -> None:
    for parts in ([Part("a", 0, 13)], [Part("a", 0, 2)]):
        serve(site, monkeypatch, parts, {"a": A})
        site.begin_step()
        site.disable()
        assert_steered(replay(site, monkeypatch), [], {})
        assert_steered(eager(site, MAX_TOKENS), [], {})


def test_the_same_batch_goes_on_after_a_dummy_run(
    site: SteeredSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(site, monkeypatch, [Part("a", 2, 1), Part("x", 0, 1)], {"a": A})
    site.disable()
    serve(site, monkeypatch, [Part("a", 3, 1), Part("x", 1, 1)], {"a": A})


def test_reordered_requests_keep_their_doses(
    site: SteeredSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = {"a": A, "b": B}
    serve(site, monkeypatch, [Part("a", 3, 1), Part("b", 3, 1), Part("x", 3, 1)], requests)
    serve(site, monkeypatch, [Part("x", 4, 1), Part("b", 4, 1), Part("a", 4, 1)], requests)


def test_other_counts_in_the_same_order_are_noticed(
    site: SteeredSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = {"a": A}
    serve(site, monkeypatch, [Part("x", 0, 5), Part("a", 0, 3)], requests)
    serve(site, monkeypatch, [Part("x", 5, 1), Part("a", 3, 4)], requests)
    serve(site, monkeypatch, [Part("x", 6, 1), Part("a", 7, 1)], requests)


def test_a_reused_id_takes_the_new_doses_after_invalidation(
    site: SteeredSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(site, monkeypatch, [Part("a", 0, 5)], {"a": A})
    for again in ({"a": B}, {"a": SteeredRequest(A.doses, prompt_len=2)}, {}):
        site.invalidate()
        serve(site, monkeypatch, [Part("a", 0, 5)], again)


@pytest.fixture
def walks() -> Iterator[tuple[list[Part], dict[str, SteeredRequest], bool]]:
    """80 steps of requests that join, run in chunks, wait, leave and come in any order."""
    dice = random.Random(9)
    phases: Any = ["all", "prompt", "generation"]

    def new_request() -> SteeredRequest | None:
        doses = []
        for name in dice.sample(sorted(STEERS), dice.randrange(4)):
            schedule: Any = dice.choice(["fixed", "start", "dim"]) if name == "walk" else None
            layers = dice.choice([None, STEERS[name].layers[-1:]])
            doses.append(Dose(name, dice.uniform(-4, 4), layers, dice.choice(phases), schedule))
        return SteeredRequest(tuple(doses), dice.randrange(1, 7)) if doses else None

    def steps() -> Iterator[tuple[list[Part], dict[str, SteeredRequest], bool]]:
        requests: dict[str, SteeredRequest | None] = {}
        position: dict[str, int] = {}
        for _ in range(80):
            changed = False
            for req_id in "abcd":
                if req_id not in requests and dice.random() < 0.5:
                    requests[req_id], position[req_id], changed = new_request(), 0, True
                elif req_id in requests and dice.random() < 0.15:
                    del requests[req_id]
                    changed = True
            running = [r for r in requests if dice.random() < 0.8]
            dice.shuffle(running)
            parts = []
            for req_id in running:
                count = dice.choice([1, 1, 1, 2, 3])
                parts.append(Part(req_id, position[req_id], count))
                position[req_id] += count
            if parts:
                yield parts, {r: request for r, request in requests.items() if request}, changed

    return steps()


def test_every_row_gets_the_doses_of_its_own_request_over_many_steps(
    site: SteeredSite, monkeypatch: pytest.MonkeyPatch, walks: Any
) -> None:
    shapes = set()
    for parts, requests, changed in walks:
        if changed:
            site.invalidate()
        serve(site, monkeypatch, parts, requests)
        depths = [len(requests[p.req_id].doses) for p in parts if p.req_id in requests]
        shapes.add((sum(part.count for part in parts), max(depths, default=0)))
    assert len(shapes) > 20


def test_a_graph_reads_the_buffers_it_was_captured_with(
    site: SteeredSite, monkeypatch: pytest.MonkeyPatch, walks: Any
) -> None:
    def places() -> list[int]:
        vectors = site.table.directions.vectors
        return [t.data_ptr() for t in (site._map.directions, site._map.strengths, vectors)]

    before = places()
    for parts, requests, _ in walks:
        site.invalidate()
        site.prepare(step_of(parts), requests, NO_HISTORY)
        assert places() == before
    site.disable()
    assert places() == before


def test_each_site_steers_its_own_layer(site: SteeredSite) -> None:
    site.prepare(step_of([Part("b", 0, 3)]), {"b": B}, NO_HISTORY)
    rows = [BASE[:3].clone(), BASE[:3].clone()]
    for layer in (0, 1):
        SiteLayer(site, layer).steer_(rows[layer], None)
    assert_steered(rows, [Part("b", 0, 3)], {"b": B})
    assert torch.equal(rows[0], BASE[:3])
