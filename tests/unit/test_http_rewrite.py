"""The middleware: which bodies it rewrites, to what, and which bytes it leaves alone."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_steer.serving.admission import asked_strengths
from vllm_steer.serving.http import Steering
from vllm_steer.serving.http.near_misses import HOLDERS, MEANT
from vllm_steer.serving.http.received import Hints, ReceivedBody
from vllm_steer.serving.http.rewriting import BODY, preset_of
from vllm_steer.serving.http.rewriting import rewrite as wanted
from vllm_steer.serving.http.routes import route_at


@pytest.fixture
def plan(make_plan: Any) -> Any:
    return make_plan({"a": 1.0}, presets={"friendly": {"a": 3.0}, "v1": {"a": 1.0}})


class Rewritten(NamedTuple):
    body: bytes
    reports: bool


def rewritten(body: bytes, plan: Any, *, route: str) -> Rewritten:
    """What the middleware makes of a body; the same object where it has nothing to do."""
    members, text = BODY.read_slowly(body)
    if members is None:
        return Rewritten(body, False)
    place = route_at(route)
    assert place is not None
    found = wanted(members, plan, place)
    if not found.members:
        return Rewritten(body, found.reports)
    received = ReceivedBody(Hints())
    received.append(found.members, to=text or body)
    return Rewritten(received.whole(), found.reports)


def rewrite(body: bytes, plan: Any, *, route: str) -> bytes:
    return rewritten(body, plan, route=route).body


def carries(path: str) -> bool:
    route = route_at(path)
    return route is not None and route.carries


def load(body: bytes) -> Any:
    """A body as vLLM reads it, without fields of ours that are empty."""
    data = json.loads(body)
    return {k: v for k, v in data.items() if v is not None or k not in ("steer", "steer_strengths")}


def dump(body: Any) -> bytes:
    return json.dumps(body).encode()


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
    assert asked_strengths(SimpleNamespace(extra_args=arguments)) is reports


@pytest.mark.parametrize("given", [1, 1.0, "true"], ids=repr)
def test_the_wish_as_an_argument_leaves_the_bytes_and_is_noticed(plan: Any, given: Any) -> None:
    body = dump({"prompt": "x", "vllm_xargs": {"steer_strengths": given}})
    found = rewritten(body, plan, route="/v1/completions")
    assert found.body is body
    assert found.reports


@pytest.mark.parametrize("given", ["yes", 2, [True], {"a": True}], ids=repr)
def test_a_wish_that_is_no_boolean_is_refused(plan: Any, given: Any) -> None:
    for body in ({"steer_strengths": given}, {"vllm_xargs": {"steer_strengths": given}}):
        with pytest.raises(ValueError, match="true or false is wanted"):
            rewrite(dump(body), plan, route="/v1/completions")


def test_a_wish_in_both_places_is_refused(plan: Any) -> None:
    body = {"steer_strengths": True, "vllm_xargs": {"steer_strengths": 1}}
    with pytest.raises(ValueError, match="steer_strengths is given both as a field and in"):
        rewrite(dump(body), plan, route="/v1/completions")


def test_a_wish_on_a_route_that_generates_nothing_is_refused(plan: Any) -> None:
    with pytest.raises(ValueError, match="this route cannot carry a steer"):
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
        ValueError, match="this route cannot carry a steer; remove it and name the base model"
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
                and key not in (*MEANT, *HOLDERS)
            )
        ),
        json_values,
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_everything_else_in_a_body_survives_rewriting(plan: Any, rest: dict[str, Any]) -> None:
    found = load(rewrite(dump({**rest, "steer": "a:3"}), plan, route="/v1/completions"))
    assert found == {**rest, "vllm_xargs": {"steer": "a:3"}}


HEADERS = [(b"Content-Length", b"1"), (b"x-other", b"kept")]


class Inside:
    """The application behind the middleware: keeps the scope and the whole body it was given."""

    def __init__(self) -> None:
        self.scope: Any = None
        self.body = b""
        self.afterwards: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scope = scope
        if scope["type"] != "http":
            return
        while True:
            message = await receive()
            self.body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.afterwards = await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


def run(
    plan: Any,
    parts: list[bytes],
    *,
    path: str = "/v1/completions",
    method: str = "POST",
    kind: str = "http",
    content_type: bytes = b"application/json",
) -> tuple[Inside, list[Any]]:
    """Send one request through the middleware; returns the application and what was sent."""
    additional = {"steer": plan.to_json()} if plan is not None else {}
    config = SimpleNamespace(additional_config=additional)
    messages: list[Any] = [
        {"type": "http.request", "body": part, "more_body": at + 1 < len(parts)}
        for at, part in enumerate(parts)
    ] + [{"type": "http.disconnect"}]
    scope = {
        "type": kind,
        "method": method,
        "path": path,
        "headers": [(b"Content-Type", content_type), *HEADERS],
        "app": SimpleNamespace(state=SimpleNamespace(vllm_config=config)),
    }
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    inside = Inside()
    asyncio.run(Steering(inside)(scope, receive, send))
    return inside, sent


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_body_in_parts_is_rewritten_with_its_new_length(plan: Any, size: int) -> None:
    body = dump({"prompt": "x", "steer": "a:3"})
    inside, sent = run(plan, [body[at : at + size] for at in range(0, len(body), size)])
    assert load(inside.body) == {"prompt": "x", "vllm_xargs": {"steer": "a:3"}}
    headers = dict(inside.scope["headers"])
    lengths = [
        value for name, value in inside.scope["headers"] if name.lower() == b"content-length"
    ]
    assert lengths == [str(len(inside.body)).encode()]
    assert headers[b"x-other"] == b"kept"
    assert sent[0]["status"] == 200


def test_a_disconnect_still_reaches_the_application(plan: Any) -> None:
    inside, _ = run(plan, [dump({"steer": "a:3"})])
    assert inside.afterwards == {"type": "http.disconnect"}


def test_an_untouched_body_keeps_its_bytes_and_its_headers(plan: Any) -> None:
    body = b'{ "prompt":\t"x" }'
    inside, _ = run(plan, [body[:3], body[3:]])
    assert inside.body == body
    assert inside.scope["headers"] == [(b"Content-Type", b"application/json"), *HEADERS]


@pytest.mark.parametrize(
    "options",
    [{"method": "GET"}, {"kind": "websocket"}, {"kind": "lifespan"}],
    ids=["get", "websocket", "lifespan"],
)
def test_what_is_no_post_passes_through(plan: Any, options: dict[str, str]) -> None:
    inside, _ = run(plan, [dump({"steer": "a:3"})], **options)
    assert inside.body in (b"", dump({"steer": "a:3"}))
    assert inside.scope["type"] == options.get("kind", "http")


def test_an_engine_without_steers_sees_every_body_as_it_came() -> None:
    body = dump({"steer": "a:3"})
    assert run(None, [body])[0].body == body


@pytest.mark.parametrize(
    "path",
    [
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/chat/completions/batch",
        "/invocations",
        "/prefix/v1/completions",
    ],
)
def test_routes_that_generate_take_a_steer(plan: Any, path: str) -> None:
    inside, sent = run(plan, [dump({"steer": "a:3"})], path=path)
    if not carries(path):  # Anthropic's, in older vLLM versions
        assert sent[0]["status"] == 400
        return
    assert load(inside.body) == {"vllm_xargs": {"steer": "a:3"}}


@pytest.mark.parametrize(
    "asked",
    [{"steer": "a:3"}, {"vllm_xargs": {"steer": "a:3"}}, {"model": "base:friendly"}],
    ids=["field", "argument", "preset-model"],
)
def test_a_route_that_cannot_carry_a_steer_refuses_every_way_to_ask(
    plan: Any, asked: dict[str, Any]
) -> None:
    """vLLM's token route generates and has no ``vllm_xargs``: a steer would be lost."""
    inside, sent = run(plan, [dump(asked)], path="/inference/v1/generate")
    assert inside.scope is None
    assert sent[0]["status"] == 400


REFUSAL = "steer: this route cannot carry a steer; remove it and name the base model"


@pytest.mark.parametrize(
    "path", ["/inference/v1/generate", "/generative_scoring", "/prefix/v1/chat/completions/render"]
)
def test_a_refusal_is_an_openai_error_and_does_not_reach_the_application(
    plan: Any, path: str
) -> None:
    inside, sent = run(plan, [dump({"steer": "a:3"})], path=path)
    assert inside.scope is None
    start, body = sent
    assert start["status"] == 400
    assert dict(start["headers"])[b"content-type"] == b"application/json"
    assert dict(start["headers"])[b"content-length"] == str(len(body["body"])).encode()
    assert json.loads(body["body"])["error"] == {
        "message": REFUSAL,
        "type": "BadRequestError",
        "param": "steer",
        "code": 400,
    }


def test_a_refusal_on_anthropics_route_has_its_form(plan: Any) -> None:
    from vllm.entrypoints.anthropic.protocol import AnthropicError, AnthropicErrorResponse

    _, (start, body) = run(plan, [dump({"steer": "b:3"})], path="/v1/messages")
    assert start["status"] == 400
    found = json.loads(body["body"])
    message = found["error"]["message"]
    error = AnthropicError(type="BadRequestError", message=message)
    assert found == AnthropicErrorResponse(error=error).model_dump()
    unknown = "steer 'b' is unknown; steers: a; presets: friendly, v1"
    assert message == (unknown if carries("/v1/messages") else REFUSAL)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"steer": "b"}, "steer"),
        ({"vllm_xargs": {"steer": "b"}}, "vllm_xargs.steer"),
        ({"steer_strengths": 5}, "steer_strengths"),
        ({"steer": "a", "vllm_xargs": 5}, "vllm_xargs"),
        ({"steers": "a"}, "steers"),
        ({"vllm_xargs": {"vllm_steer_stream": {}}}, "vllm_xargs.vllm_steer_stream"),
    ],
    ids=str,
)
def test_a_refusal_names_the_field_that_was_sent(plan: Any, body: Any, param: str) -> None:
    _, (_, sent) = run(plan, [dump(body)])
    assert json.loads(sent["body"])["error"]["param"] == param
