"""Where steers are placed in the reserved memory, and which of them have to go."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_steer.planned_steer import PlannedSteer
from vllm_steer.runtime.refusal import Refused
from vllm_steer.runtime.residency import (
    LEASE_SECONDS,
    Residency,
    capacities,
    check_fits,
    needed_room,
)
from vllm_steer.runtime_config import Room

ROOM = Room(
    lm_steers=2,
    vectors=3,
    delta_steps=10,
    low_rank_maps=2,
    max_map_rank=4,
    conditions=5,
    sites=("resid", "heads"),
    modes=("add", "rotate", "clamp"),
)


def planned(site: str = "head", steps: int | None = None, **fields: Any) -> PlannedSteer:
    defaults = {
        "path": Path("/x"),
        "overrides": {},
        "kind": "lm_steer",
        "hidden_size": 6,
        "default_strength": 1.0,
        "content": "c",
    }
    return PlannedSteer(**{**defaults, "site": site, "steps": steps, **fields})


def test_each_kind_has_its_own_room() -> None:
    assert capacities(ROOM) == {
        "lm_steers": 2,
        "vectors at resid": 3,
        "low_rank_maps at resid": 2,
        "conditions at resid": 5,
        "delta_steps at resid": 10,
        "delta_steps at heads": 10,
    }
    assert needed_room(planned()) == ("lm_steers", 1)
    assert needed_room(planned(variant="offset")) == ("offsets", 1)
    assert needed_room(planned("resid")) == ("vectors at resid", 1)
    assert needed_room(planned("resid", kind="sae")) == ("vectors at resid", 1)
    assert needed_room(planned("resid", kind="low_rank")) == ("low_rank_maps at resid", 1)
    assert needed_room(planned("resid", kind="condition")) == ("conditions at resid", 1)
    assert needed_room(planned("heads", steps=7)) == ("delta_steps at heads", 7)


def test_room_at_heads_is_for_steps_alone() -> None:
    room = Room(lm_steers=1, vectors=2, delta_steps=0, low_rank_maps=2, conditions=2)
    assert room.has_maps and room.has_conditions
    at_heads = {**room.model_dump(), "sites": ["heads"]}
    only = Room(**at_heads)
    assert (only.layer_sites, only.has_maps, only.has_conditions) == ((), False, False)
    assert Room(**{**at_heads, "delta_steps": 3}).layer_sites == ("heads",)
    with pytest.raises(ValueError, match="heads has room for delta_steps only"):
        Room(**{**at_heads, "lm_steers": 0})


def test_the_least_recently_used_steer_leaves_first() -> None:
    residency = Residency(ROOM)
    for now, key in enumerate("ab"):
        assert residency.add(key, planned(), in_use=(), now=float(now)) == []
    residency.use("a", 5.0)
    assert residency.add("c", planned(), in_use=(), now=6.0) == ["b"]
    assert residency.place_of("c").start == 1
    assert "b" not in residency


def test_a_steer_in_use_or_under_a_lease_does_not_leave() -> None:
    residency = Residency(ROOM)
    for key in "ab":
        residency.add(key, planned(), in_use=(), now=0.0)
    residency.lease("b", 1.0)
    with pytest.raises(Refused, match=r"no one of the 2 lm_steers is free") as refused:
        residency.add("c", planned(), in_use=("a",), now=2.0)
    assert refused.value.status == 409
    assert "a" in residency and "b" in residency
    assert residency.add("c", planned(), in_use=("a",), now=1.0 + LEASE_SECONDS) == ["b"]


def test_a_request_that_has_come_ends_the_lease() -> None:
    residency = Residency(ROOM)
    for key in "ab":
        residency.add(key, planned(), in_use=(), now=0.0)
        residency.lease(key, 0.0)
    residency.use("a", 0.5)
    assert residency.add("c", planned(), in_use=(), now=1.0) == ["a"]


def test_steps_lie_in_a_row_and_several_steers_may_leave_for_one() -> None:
    residency = Residency(ROOM)
    for now, key in enumerate("abc"):
        residency.add(key, planned("resid", steps=3), in_use=(), now=float(now))
    assert [residency.place_of(key).start for key in "abc"] == [0, 3, 6]
    residency.remove("b")
    with pytest.raises(Refused, match=r"no 4 in a row of the 10 delta_steps at resid is free"):
        residency.add("d", planned("resid", steps=4), in_use=("a", "c"), now=9.0)
    assert residency.add("d", planned("resid", steps=4), in_use=("c",), now=9.0) == ["a"]
    assert residency.place_of("d").start == 0
    assert residency.used(("c", "d"))["delta_steps at resid"] == (7, 10)


@pytest.mark.parametrize(
    ("steer", "message"),
    [
        (planned("attn_in"), "there is no room for vectors at attn_in; runtime.room has 2 lm"),
        (planned("resid", steps=11), "there is no room for 11 delta_steps at resid"),
        (planned(variant="offset"), "there is no room for offsets"),
        (planned(rank=2000), "its rank over all columns is 2000; runtime.room.max_rank is 1024"),
        (planned("resid", mode="rotate"), "its mode is rotate; runtime.room.modes has add"),
        (planned("resid", kind="sae", mode="clamp"), "its mode is clamp; runtime.room.modes has"),
        (planned("resid", kind="low_rank", rank=5), "is 5; runtime.room.max_map_rank is 4"),
        (planned("attn_in", kind="low_rank"), "no room for low_rank_maps at attn_in"),
        (planned("attn_in", kind="condition"), "no room for conditions at attn_in"),
    ],
    ids=["site", "steps", "offset", "rank", "mode", "feature", "map", "map-site", "condition"],
)
def test_what_the_room_could_never_hold_is_refused(steer: PlannedSteer, message: str) -> None:
    with pytest.raises(Refused, match=message) as refused:
        check_fits("s", steer, ROOM.model_copy(update={"modes": ("add",)}))
    assert refused.value.status == 422


Adding = tuple[int, int, bool]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 6), st.booleans()), max_size=30))
def test_places_never_overlap_and_steers_in_use_stay(steps: list[Adding]) -> None:
    residency, in_use, lengths = Residency(ROOM), set[str](), dict[str, int]()
    for now, (number, length, used) in enumerate(steps):
        key = f"{number}"
        if key not in residency:
            lengths[key] = length
            try:
                residency.add(key, planned("resid", steps=length), in_use=in_use, now=float(now))
            except Refused:
                taken = sum(lengths[k] for k in in_use if k in residency)
                assert taken + length > 10 or len(in_use) > 0
                continue
        in_use = in_use | {key} if used else in_use - {key}
        assert all(k in residency for k in in_use)
        places = sorted(
            (p.start, p.start + p.length)
            for k in lengths
            if k in residency
            for p in [residency.place_of(k)]
        )
        assert all(end <= start for (_, end), (start, _) in pairwise(places))
        assert not places or places[-1][1] <= 10
