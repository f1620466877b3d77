"""``GET /v1/steers``: what a client learns about the steers and presets of a server."""

import json
from typing import Any

import pytest
from guidance import plan_for, vector
from http_get import get

from vllm_steer import embedded
from vllm_steer.config import SteerConfig
from vllm_steer.plan import SteerPlan


@pytest.fixture(scope="module")
def embedded_plan() -> SteerPlan:
    return SteerPlan.of(SteerConfig.load(embedded.STEER_CONFIG))


def listed(plan: SteerPlan) -> dict[str, Any]:
    reply = get(plan, "/v1/steers")
    assert (reply.status, reply.passed_on) == (200, False)
    assert reply.headers["content-type"] == "application/json"
    answer: dict[str, Any] = json.loads(reply.body)
    return answer


def test_a_steer_and_a_preset_are_listed_with_these_fields(make_plan: Any) -> None:
    plan = make_plan({"a": 2.5}, presets={"friendly": {"a": 3.0}}, max_strength=8)
    assert listed(plan) == {
        "object": "list",
        "runtime": False,
        "data": [
            {
                "id": "a",
                "object": "steer",
                "kind": "lm_steer",
                "site": "head",
                "layers": None,
                "mode": None,
                "default_strength": 2.5,
                "limit": 8,
                "digest": "a",
                "source": "config",
                "in_use": None,
            },
            {"id": "friendly", "object": "preset", "steers": {"a": 3.0}, "source": "config"},
        ],
    }


def test_steers_without_a_limit_have_none(make_plan: Any) -> None:
    (entry,) = listed(make_plan({"a": 1.0}))["data"]
    assert entry["limit"] is None


def test_the_embedded_steers_are_listed_with_kind_site_layers_and_mode(
    embedded_plan: SteerPlan,
) -> None:
    entries = {entry["id"]: entry for entry in listed(embedded_plan)["data"]}
    facts = ("kind", "site", "layers", "mode", "default_strength")
    assert {name: tuple(entries[name][fact] for fact in facts) for name in CHOSEN} == CHOSEN
    assert entries["polite-praise"] == {
        "id": "polite-praise",
        "object": "preset",
        "steers": {"sentiment": 4, "formality": 4},
        "source": "config",
    }
    steers = [entry for entry in entries.values() if entry["object"] == "steer"]
    assert len({entry["digest"] for entry in steers}) == len(steers) == 12


CHOSEN = {
    "french": ("lm_steer", "head", None, None, 5),
    "formality-vector": ("vector", "attn_in", "1-3", "rotate", 3),
    "formality-shift": ("vector", "resid", "0-1", "add", 1.5),
    "french-delta": ("delta", "heads", "0-3", None, 1.5),
}


def test_the_options_of_a_preset_are_listed_as_they_were_written(make_plan: Any) -> None:
    mix = {"a": {"strength": 6, "phase": "generation"}}
    plan = make_plan({"a": 1.0}).model_copy(update={"presets": {"witty": mix}})
    assert listed(plan)["data"][1]["steers"] == mix


@pytest.mark.parametrize("path", ["/v1/steers", "/v1/steer_sites", "/steer"])
def test_nothing_but_the_root_path_may_come_before_a_route(make_plan: Any, path: str) -> None:
    """vLLM's check of API keys would not see a path that begins with something else."""
    plan = make_plan({"a": 1.0}).model_copy(update={"playground": True})
    assert get(plan, f"/other{path}").passed_on
    assert get(plan, f"/{path}").passed_on
    if path != "/v1/steer_sites":  # which asks the engine
        assert not get(plan, f"/prefix{path}", root_path="/prefix").passed_on


@pytest.mark.parametrize("method", ["POST", "DELETE", "OPTIONS"])
def test_other_methods_reach_the_application(make_plan: Any, method: str) -> None:
    assert get(make_plan({"a": 1.0}), "/v1/steers", method=method).passed_on


@pytest.mark.parametrize("path", ["/v1/steers", "/steer"])
def test_an_engine_without_steers_has_neither_list_nor_page(path: str) -> None:
    assert get(None, path).passed_on


def test_no_path_of_a_file_is_listed() -> None:
    text = json.dumps(listed(plan_for({"v": vector((1, 2))})))
    assert "/steers/v.safetensors" not in text
