"""Rewriting of bodies by the middleware, and bytes that stay unchanged."""

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
def test_the_steer_field_becomes_an_argument(plan: Any, body: Any, steer: Any) -> None:
    body = {"model": "base", "prompt": "x", **body}
    result = load(rewrite(dump(body), plan, route="/v1/completions"))
    assert result.pop("vllm_xargs") == {"steer": steer}
    other_fields = {
        name: value for name, value in body.items() if name not in ("steer", "vllm_xargs")
    }
    assert result == other_fields


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
def test_steer_strengths_becomes_an_argument_that_admission_reads(
    plan: Any, body: dict[str, Any], arguments: dict[str, Any], reports: bool
) -> None:
    result = rewritten(dump({"prompt": "x", **body}), plan, route="/v1/completions")
    assert result.reports is reports
    data = load(result.body)
    assert data["vllm_xargs"] == arguments
    assert "steer_strengths" not in data
    assert wants_strengths(SimpleNamespace(extra_args=arguments)) is reports


@pytest.mark.parametrize("value", [1, 1.0, "true"], ids=repr)
def test_steer_strengths_as_an_argument_is_read_and_leaves_the_bytes(plan: Any, value: Any) -> None:
    body = dump({"prompt": "x", "vllm_xargs": {"steer_strengths": value}})
    result = rewritten(body, plan, route="/v1/completions")
    assert result.body is body
    assert result.reports


@pytest.mark.parametrize("value", ["yes", 2, [True], {"a": True}], ids=repr)
def test_steer_strengths_that_is_not_a_boolean_is_refused(plan: Any, value: Any) -> None:
    for body in ({"steer_strengths": value}, {"vllm_xargs": {"steer_strengths": value}}):
        with pytest.raises(ValueError, match="expected true or false"):
            rewrite(dump(body), plan, route="/v1/completions")


def test_steer_strengths_as_field_and_argument_is_refused(plan: Any) -> None:
    body = {"steer_strengths": True, "vllm_xargs": {"steer_strengths": 1}}
    with pytest.raises(ValueError, match="steer_strengths is given both as a field and in"):
        rewrite(dump(body), plan, route="/v1/completions")


def test_steer_strengths_on_a_route_that_generates_nothing_is_refused(plan: Any) -> None:
    with pytest.raises(ValueError, match="this route does not support steering"):
        rewrite(dump({"steer_strengths": True}), plan, route="/generative_scoring")


def test_other_arguments_are_kept(plan: Any) -> None:
    body = {"steer": "a:3", "vllm_xargs": {"other": [1, "x"], "n": 2}}
    result = load(rewrite(dump(body), plan, route="/v1/completions"))
    assert result == {"vllm_xargs": {"other": [1, "x"], "n": 2, "steer": "a:3"}}


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
def test_a_body_without_a_steer_keeps_its_bytes(plan: Any, body: bytes) -> None:
    assert rewrite(body, plan, route="/v1/completions") is body


def test_a_steer_as_field_and_argument_is_refused(plan: Any) -> None:
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
        result = load(rewrite(body, plan, route="/v1/completions"))
    except ValueError as error:
        assert "vllm_xargs" in str(error)
    else:
        assert result["vllm_xargs"] == xargs


def test_a_very_deep_body_is_refused_or_left_to_vllm(plan: Any) -> None:
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
    """vLLM parses with ``json.loads``: a steer that this finds is never served unsteered."""
    try:
        json.loads(body)
    except ValueError:
        return
    result = load(rewrite(body, plan, route="/v1/completions"))
    assert result == {"vllm_xargs": {"steer": "a:3"}}


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
def test_the_preset_name_follows_the_last_colon(plan: Any, model: Any, preset: str | None) -> None:
    assert preset_of(model, plan) == preset


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(
    other_fields=st.dictionaries(
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
def test_all_other_fields_of_a_body_are_kept(plan: Any, other_fields: dict[str, Any]) -> None:
    result = load(rewrite(dump({**other_fields, "steer": "a:3"}), plan, route="/v1/completions"))
    assert result == {**other_fields, "vllm_xargs": {"steer": "a:3"}}
