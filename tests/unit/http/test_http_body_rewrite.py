"""Bodies as the middleware rewrites them: to what, and which bytes it leaves alone."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from http_tools import dump, load, rewrite, rewritten
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_steer.serving.http.body_rewrite import preset_of
from vllm_steer.serving.http.misspelled_fields import BODY_MISSPELLINGS, CLIENT_ONLY_FIELDS
from vllm_steer.serving.request_args import wants_strengths


@pytest.fixture
def plan(make_plan: Any) -> Any:
    return make_plan({"a": 1.0}, presets={"friendly": {"a": 3.0}, "v1": {"a": 1.0}})


@pytest.mark.parametrize(
    ("body", "steer"),
    [
        ({"steer": "a:3"}, "a:3"),
        ({"steer": {"a": {"strength": 3}}}, '{"a": {"strength": 3}}'),
        ({"steer": {}}, "{}"),
        ({"steer": ""}, ""),
        ({"steer": "a:3", "vllm_xargs": None}, "a:3"),
        ({"model": "base:friendly"}, "friendly"),
        ({"model": "org/base:friendly", "steer": None}, "friendly"),
        ({"model": "base:friendly", "steer": "none"}, "none"),
    ],
    ids=str,
)
def test_what_is_asked_arrives_as_an_argument(plan: Any, body: Any, steer: Any) -> None:
    body = {"model": "base", "prompt": "x", **body}
    found = load(rewrite(dump(body), plan, route="/v1/completions"))
    assert found.pop("vllm_xargs") == {"steer": steer}
    rest = {name: value for name, value in body.items() if name not in ("steer", "vllm_xargs")}
    assert found == rest


@pytest.mark.parametrize(
    ("body", "arguments", "reports"),
    [
        ({"steer_strengths": True}, {"steer_strengths": "true"}, True),
        ({"steer_strengths": False}, {"steer_strengths": "false"}, False),
        ({"steer_strengths": 1, "steer": "a"}, {"steer": "a", "steer_strengths": 1}, True),
        (
            {"steer_strengths": True, "vllm_xargs": {"steer": "a"}},
            {"steer": "a", "steer_strengths": "true"},
            True,
        ),
        (
            {"steer_strengths": True, "model": "base:friendly"},
            {"steer": "friendly", "steer_strengths": "true"},
            True,
        ),
    ],
    ids=["alone", "false", "beside-a-steer", "steer-in-arguments", "preset-model"],
)
def test_the_wish_for_strengths_arrives_as_an_argument_that_admission_reads(
    plan: Any, body: dict[str, Any], arguments: dict[str, Any], reports: bool
) -> None:
    found = rewritten(dump({"prompt": "x", **body}), plan, route="/v1/completions")
    assert found.reports is reports
    data = load(found.body)
    assert data["vllm_xargs"] == arguments
    assert "steer_strengths" not in data
    assert wants_strengths(SimpleNamespace(extra_args=arguments)) is reports


@pytest.mark.parametrize("given", [1, 1.0, "true"], ids=repr)
def test_the_wish_as_an_argument_leaves_the_bytes_and_is_noticed(plan: Any, given: Any) -> None:
    body = dump({"prompt": "x", "vllm_xargs": {"steer_strengths": given}})
    found = rewritten(body, plan, route="/v1/completions")
    assert found.body is body
    assert found.reports


@pytest.mark.parametrize("given", ["yes", 2, [True], {"a": True}], ids=repr)
def test_a_wish_that_is_no_boolean_is_refused(plan: Any, given: Any) -> None:
    for body in ({"steer_strengths": given}, {"vllm_xargs": {"steer_strengths": given}}):
        with pytest.raises(ValueError, match="expected true or false"):
            rewrite(dump(body), plan, route="/v1/completions")


def test_a_wish_in_both_places_is_refused(plan: Any) -> None:
    body = {"steer_strengths": True, "vllm_xargs": {"steer_strengths": 1}}
    with pytest.raises(ValueError, match="steer_strengths is given both as a field and in"):
        rewrite(dump(body), plan, route="/v1/completions")


def test_a_wish_on_a_route_that_generates_nothing_is_refused(plan: Any) -> None:
    with pytest.raises(ValueError, match="this route does not support steering"):
        rewrite(dump({"steer_strengths": True}), plan, route="/generative_scoring")


def test_other_arguments_are_kept(plan: Any) -> None:
    body = {"steer": "a:3", "vllm_xargs": {"other": [1, "x"], "n": 2}}
    found = load(rewrite(dump(body), plan, route="/v1/completions"))
    assert found == {"vllm_xargs": {"other": [1, "x"], "n": 2, "steer": "a:3"}}


UNTOUCHED = [
    b"",
    b"not json",
    b'{"steer": ',
    b'["steer"]',
    b'"steer"',
    b"\xff\xfe",
    dump({"model": "base", "prompt": "x"}),
    dump({"prompt": 'say "steer" and base:friendly', "model": "base"}),
    dump({"prompt": "x", "steer": None}),
    dump({"prompt": "x", "steer_strengths": None}),
    dump({"vllm_xargs": {"steer": "a:3"}}),
    dump({"vllm_xargs": {"steer": "a:3"}, "model": "base:friendly"}),
    dump({"model": "base:happy"}),
    dump({"model": ["base:friendly"]}),
    dump({"messages": [{"content": "x", "steer": "a:3"}]}),
]


@pytest.mark.parametrize("body", UNTOUCHED, ids=lambda body: body.decode(errors="replace"))
def test_a_body_that_asks_nothing_of_us_stays_the_bytes_it_was(plan: Any, body: bytes) -> None:
    assert rewrite(body, plan, route="/v1/completions") is body


def test_a_steer_in_both_places_is_refused(plan: Any) -> None:
    body = {"steer": "a:3", "vllm_xargs": {"steer": "a:3"}}
    with pytest.raises(ValueError, match="both as a field and in vllm_xargs; give it once"):
        rewrite(dump(body), plan, route="/v1/completions")


def test_a_steer_on_a_route_that_generates_nothing_is_refused(plan: Any) -> None:
    with pytest.raises(
        ValueError,
        match="this route does not support steering; remove the steer and name the base model",
    ):
        rewrite(dump({"steer": "a:3"}), plan, route="/v1/completions/render")


@pytest.mark.parametrize("xargs", ["a:3", 5, [1], True, "x"], ids=repr)
def test_arguments_that_are_no_object_are_refused_or_left_to_vllm(plan: Any, xargs: Any) -> None:
    """Anything but a ``ValueError`` would reach the client as a 500."""
    body = dump({"steer": "a:3", "vllm_xargs": xargs})
    try:
        found = load(rewrite(body, plan, route="/v1/completions"))
    except ValueError as error:
        assert "vllm_xargs" in str(error)
    else:
        assert found["vllm_xargs"] == xargs


def test_a_body_of_monstrous_depth_is_refused_or_left_to_vllm(plan: Any) -> None:
    body = b'{"steer":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001
    try:
        assert rewrite(body, plan, route="/v1/completions") is body
    except ValueError as error:
        assert str(error)


@pytest.mark.parametrize(
    "body",
    [
        b'{"\\u0073teer": "a:3"}',
        json.dumps({"steer": "a:3"}).encode("utf-16"),
        b'{"steer" : "a:3"}',
        b'\xef\xbb\xbf{"steer": "a:3"}',
    ],
    ids=["escaped-key", "utf-16", "spaced", "byte-order-mark"],
)
def test_a_steer_in_any_spelling_of_json_is_never_lost(plan: Any, body: bytes) -> None:
    """vLLM reads the body with ``json.loads``: what that finds there is not served unsteered."""
    try:
        json.loads(body)
    except ValueError:
        return
    found = load(rewrite(body, plan, route="/v1/completions"))
    assert found == {"vllm_xargs": {"steer": "a:3"}}


@pytest.mark.parametrize(
    ("model", "preset"),
    [
        ("base:friendly", "friendly"),
        ("org/base:friendly", "friendly"),
        ("a:b:friendly", "friendly"),
        ("base:happy", None),
        ("friendly", None),
        ("base:friendly:", None),
        ("", None),
        (None, None),
        (5, None),
    ],
    ids=repr,
)
def test_a_preset_is_what_stands_behind_the_last_colon(
    plan: Any, model: Any, preset: str | None
) -> None:
    assert preset_of(model, plan) == preset


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(
    rest=st.dictionaries(
        st.text().filter(
            lambda key: (
                key not in ("steer", "steer_strengths", "vllm_xargs", "model")
                and key not in (*BODY_MISSPELLINGS, *CLIENT_ONLY_FIELDS)
            )
        ),
        json_values,
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_everything_else_in_a_body_survives_rewriting(plan: Any, rest: dict[str, Any]) -> None:
    found = load(rewrite(dump({**rest, "steer": "a:3"}), plan, route="/v1/completions"))
    assert found == {**rest, "vllm_xargs": {"steer": "a:3"}}
