"""Guided sites in the batch: expected in every step with steered requests, idle in all others."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from guidance import WIDTH, delta, head, params, plan_for, vector

from vllm_steer.bank import HeadTable, fill_head_bank
from vllm_steer.bank.layers import fill_layer_bank
from vllm_steer.kernels.guidance import cpu, torch_gather
from vllm_steer.kernels.lm_steer import reference
from vllm_steer.serving import mapped_site as site_module
from vllm_steer.serving import runners
from vllm_steer.serving.batch import SteeredBatch
from vllm_steer.serving.site import SteeredSite
from vllm_steer.serving.step import Step

CPU = torch.device("cpu")
ROOM = 8
STEERS: dict[str, Any] = {
    "bend": vector((0,), site="attn_in", mode="rotate"),
    "walk": delta(2, (0,), site="attn_in"),
    "push": vector((0,)),
    "shift": vector((0,), seed=1),
    "word": head(),
}
BASE = torch.randn(ROOM, WIDTH, generator=torch.Generator().manual_seed(4))


@pytest.fixture(params=[torch_gather, cpu], ids=["map", "host"])
def sites(request: pytest.FixtureRequest) -> dict[str, SteeredSite]:
    """Both sites of an engine in service."""
    inside = {name: steer for name, steer in STEERS.items() if steer.kind != "lm_steer"}
    bank = fill_layer_bank(inside, layers=[0], device=CPU, project=lambda _, rows: rows)
    sites_by_name = {
        table.site: SteeredSite(table, request.param, max_doses=4, max_tokens=ROOM, device=CPU)
        for table in bank.tables
    }
    for site in sites_by_name.values():
        site.start_serving()
    return sites_by_name


@pytest.fixture
def batch(sites: dict[str, SteeredSite]) -> SteeredBatch:
    return SteeredBatch(plan_for(STEERS), CPU, reference, tuple(sites.values()))


@pytest.fixture
def words() -> HeadTable:
    table = fill_head_bank({"word": STEERS["word"]}, dtype=torch.float32, device=CPU).hidden
    assert table is not None
    return table


def begin(batch: SteeredBatch, *new: tuple[str, Any, int], finished: Any = ()) -> None:
    batch.begin_step([(r, params(steer), prompt_len) for r, steer, prompt_len in new], finished)


def announce(batch: SteeredBatch, **tokens: tuple[int, int]) -> None:
    """The step's requests with the first position and the number of their tokens."""
    counts = np.array([n for _, n in tokens.values()], dtype=np.int64)
    positions = [start + i for start, n in tokens.values() for i in range(n)]
    starts = torch.tensor([0, *counts.cumsum()], dtype=torch.int32)
    ones = np.ones(len(tokens), dtype=np.int64)
    batch.announce(Step(list(tokens), ones, counts, starts, torch.tensor(positions)))


def passed(site: SteeredSite, num_tokens: int = ROOM) -> torch.Tensor:
    """What a pass adds to the base rows."""
    hidden = BASE[:num_tokens].clone()
    site.steer_(hidden, None, 0)
    return hidden - BASE[:num_tokens]


def rows(site: SteeredSite, num_tokens: int = ROOM) -> list[int]:
    """The rows that a pass changes."""
    return passed(site, num_tokens).abs().sum(1).nonzero().flatten().tolist()


def added(name: str) -> torch.Tensor:
    vector: torch.Tensor = STEERS[name].vectors[0]
    return vector


def test_each_site_takes_the_doses_of_its_own_steers(
    batch: SteeredBatch, sites: dict[str, SteeredSite], words: HeadTable
) -> None:
    begin(
        batch,
        ("a", "push:2", 1),
        ("b", None, 1),
        ("c", {"walk": 1, "word": 3}, 2),
        ("d", {"push": 1, "shift": 1, "bend": 4}, 1),
        ("e", "word", 1),
    )
    announce(batch, a=(0, 1), b=(0, 1), c=(0, 4), d=(0, 1), e=(0, 1))
    assert rows(sites["resid"]) == [0, 6]
    assert rows(sites["attn_in"]) == [3, 4, 6]
    torch.testing.assert_close(passed(sites["resid"])[0], 2 * added("push"))
    torch.testing.assert_close(passed(sites["resid"])[6], added("push") + added("shift"))
    result = batch.head_rows.metadata_for(torch.zeros(5, WIDTH), words)
    assert result is not None
    assert result.rows.tolist() == [2, 4]


@pytest.mark.parametrize("steer", ["word:3", "push:2", {"walk": 1}], ids=str)
def test_a_forward_pass_before_its_tokens_are_announced_is_an_error(
    batch: SteeredBatch, sites: dict[str, SteeredSite], steer: Any
) -> None:
    """Whatever kind of steer is alive: the step may hold any of them."""
    begin(batch, ("a", steer, 3))
    for name, site in sites.items():
        with pytest.raises(RuntimeError, match=f"a step reached {name} without its tokens"):
            passed(site)
    announce(batch, a=(0, 3))
    for site in sites.values():
        passed(site, 3)
    begin(batch)
    with pytest.raises(RuntimeError, match="without its tokens"):
        passed(sites["resid"])


def test_a_step_without_tokens_is_followed_by_steps_of_both_kinds(
    batch: SteeredBatch, sites: dict[str, SteeredSite]
) -> None:
    """A runner may get a request and have nothing to run."""
    begin(batch, ("a", "push:2", 1))
    begin(batch)
    announce(batch, a=(0, 1))
    assert rows(sites["resid"]) == [0]
    begin(batch)
    batch.begin_dummy_run()
    assert rows(sites["resid"]) == []
    begin(batch, finished=("a",))
    assert rows(sites["resid"]) == []


def test_requests_with_a_dose_at_the_head_only_leave_the_sites_idle(
    batch: SteeredBatch, sites: dict[str, SteeredSite], words: HeadTable
) -> None:
    begin(batch, ("a", {"word": 2}, 2), ("b", "push:1", 2))
    announce(batch, a=(0, 2), b=(0, 2))
    assert rows(sites["resid"]) == [2, 3]
    begin(batch, finished=("b",))
    announce(batch, a=(2, 1))
    assert all(rows(site) == [] for site in sites.values())
    result = batch.head_rows.metadata_for(torch.zeros(1, WIDTH), words)
    assert result is not None
    assert result.rows.tolist() == [0]


def test_after_the_last_steered_request_nothing_is_announced_or_steered(
    batch: SteeredBatch, sites: dict[str, SteeredSite], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(batch, ("a", "push:2,bend:3", 1), ("b", None, 1))
    announce(batch, a=(0, 4), b=(0, 4))
    begin(batch, finished=("a",))
    assert not batch.has_steered_requests
    monkeypatch.setattr(site_module, "_capturing", lambda device: True)
    assert all(rows(site) == [] for site in sites.values())


def test_a_request_that_waits_a_step_is_steered_when_it_returns(
    batch: SteeredBatch, sites: dict[str, SteeredSite]
) -> None:
    begin(batch, ("a", "push:2", 1), ("b", "shift:3", 1))
    announce(batch, a=(0, 1), b=(0, 1))
    begin(batch)
    announce(batch, b=(1, 1))
    torch.testing.assert_close(passed(sites["resid"])[0], 3 * added("shift"))
    begin(batch, ("c", None, 9))
    announce(batch, c=(0, 3))
    assert rows(sites["resid"]) == []
    begin(batch)
    announce(batch, c=(3, 1), a=(1, 1))
    assert rows(sites["resid"]) == [1]
    torch.testing.assert_close(passed(sites["resid"])[1], 2 * added("push"))


def test_a_preempted_request_that_is_sent_again_walks_the_same_steps(
    batch: SteeredBatch, sites: dict[str, SteeredSite]
) -> None:
    """With its generated tokens: its prompt length is unchanged."""
    begin(batch, ("a", "walk:2", 3))
    announce(batch, a=(0, 3))
    begin(batch)
    announce(batch, a=(3, 1))
    begin(batch, ("a", "walk:2", 3))
    announce(batch, a=(0, 5))
    assert rows(sites["attn_in"]) == [2, 3]
    for row, step in ((2, 0), (3, 1)):
        torch.testing.assert_close(
            passed(sites["attn_in"])[row], 2 * STEERS["walk"].delta[step, 0], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("announced_finished", [True, False], ids=["finished", "unnoticed"])
@pytest.mark.parametrize("again", [None, "none", "word:1", "push:0"], ids=str)
def test_a_reused_id_does_not_inherit_a_dose(
    batch: SteeredBatch, sites: dict[str, SteeredSite], again: Any, announced_finished: bool
) -> None:
    begin(batch, ("a", "push:2", 1), ("b", "shift:1", 1))
    announce(batch, a=(0, 1), b=(0, 1))
    begin(batch, ("a", again, 1), finished=("a",) if announced_finished else ())
    announce(batch, a=(0, 1), b=(1, 1))
    assert rows(sites["resid"]) == [1]


def test_a_reused_id_with_another_prompt_starts_at_its_own_position(
    batch: SteeredBatch, sites: dict[str, SteeredSite]
) -> None:
    for prompt_len, expected in ((2, [1, 2]), (4, [3, 4])):
        begin(batch, ("a", "walk", prompt_len), finished=("a",))
        announce(batch, a=(0, 6))
        assert rows(sites["attn_in"]) == expected


def test_the_default_of_the_config_steers_requests_without_a_steer(
    sites: dict[str, SteeredSite],
) -> None:
    plan = plan_for(
        STEERS, default="p", presets={"p": {"push": {"strength": 2, "phase": "prompt"}}}
    )
    batch = SteeredBatch(plan, CPU, reference, tuple(sites.values()))
    begin(batch, ("a", None, 2), ("b", "none", 2), ("c", "p:-1", 1))
    announce(batch, a=(0, 3), b=(0, 2), c=(0, 2))
    assert rows(sites["resid"]) == [0, 1, 5]
    torch.testing.assert_close(passed(sites["resid"])[5], -2 * added("push"))


@pytest.mark.parametrize("sites", [torch_gather], indirect=True)
def test_more_tokens_than_the_map_holds_are_an_error(
    batch: SteeredBatch, sites: dict[str, SteeredSite]
) -> None:
    begin(batch, ("a", "push:2", 1))
    announce(batch, a=(0, 2))
    with pytest.raises(RuntimeError, match="9 tokens at resid, room for 8"):
        sites["resid"].steer_(torch.zeros(ROOM + 1, WIDTH), None, 0)
    begin(batch)
    with pytest.raises(RuntimeError):
        announce(batch, a=(0, ROOM + 1))


def test_rows_may_come_in_three_dimensions_and_with_their_residual(
    batch: SteeredBatch, sites: dict[str, SteeredSite]
) -> None:
    begin(batch, ("a", "bend:4", 1))
    announce(batch, a=(0, 3))
    residual = BASE.flip(0)
    hidden = (BASE - residual)[None]
    sites["attn_in"].steer_(hidden, residual[None].contiguous(), 0)
    torch.testing.assert_close(hidden[0] + residual - BASE, passed(sites["attn_in"]))


def test_a_dummy_run_at_start_up_has_the_largest_depth_and_changes_nothing() -> None:
    (table,) = fill_layer_bank(
        {"bend": STEERS["bend"]}, layers=[0], device=CPU, project=lambda _, rows: rows
    ).tables
    site = SteeredSite(table, torch_gather, max_doses=3, max_tokens=ROOM, device=CPU)
    depths: list[int] = []
    backend, run = site._backend, site._backend.steer_tokens_
    site._backend = SimpleNamespace(  # type: ignore[assignment]
        map_tokens=backend.map_tokens,
        steer_tokens_=lambda *args: (depths.append(args[-1]), run(*args)),
    )
    assert rows(site) == []
    assert (depths, site.reached) == ([3], {0})
    site.start_serving()
    assert rows(site) == []
    assert depths == [3]


@pytest.mark.parametrize(
    ("ids", "embeds", "length"),
    [([1, 2, 3], None, 3), (None, torch.zeros(4, 2), 4), ([1, 2], torch.zeros(2, 2), 2)],
    ids=["tokens", "embeds", "both"],
)
def test_the_runners_give_the_prompt_length_of_the_request(
    ids: Any, embeds: Any, length: int
) -> None:
    new = SimpleNamespace(
        prompt_token_ids=ids, prompt_embeds=embeds, prefill_token_ids=[1, 2, 3, 4, 5, 6]
    )
    assert runners._prompt_len(new) == length
