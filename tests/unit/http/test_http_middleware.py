"""The middleware as an application sees it: requests passed on, rewritten and refused."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from http_tools import dump, load, passes_vllm_xargs

from vllm_steer.serving.http import Steering


@pytest.fixture
def plan(make_plan: Any) -> Any:
    return make_plan({"a": 1.0}, presets={"friendly": {"a": 3.0}, "v1": {"a": 1.0}})


HEADERS = [(b"Content-Length", b"1"), (b"x-other", b"kept")]


class Inside:
    """The application after the middleware: records the scope and the whole body."""

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
    """Send one request through the middleware; returns the application and the response."""
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
    replies: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        replies.append(message)

    inside = Inside()
    asyncio.run(Steering(inside)(scope, receive, send))
    return inside, replies


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_body_in_parts_is_rewritten_with_its_new_length(plan: Any, size: int) -> None:
    body = dump({"prompt": "x", "steer": "a:3"})
    inside, replies = run(plan, [body[at : at + size] for at in range(0, len(body), size)])
    assert load(inside.body) == {"prompt": "x", "vllm_xargs": {"steer": "a:3"}}
    headers = dict(inside.scope["headers"])
    lengths = [
        value for name, value in inside.scope["headers"] if name.lower() == b"content-length"
    ]
    assert lengths == [str(len(inside.body)).encode()]
    assert headers[b"x-other"] == b"kept"
    assert replies[0]["status"] == 200


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
def test_requests_other_than_post_pass_through(plan: Any, options: dict[str, str]) -> None:
    inside, _ = run(plan, [dump({"steer": "a:3"})], **options)
    assert inside.body in (b"", dump({"steer": "a:3"}))
    assert inside.scope["type"] == options.get("kind", "http")


def test_an_engine_without_steers_gets_every_body_unchanged() -> None:
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
    inside, replies = run(plan, [dump({"steer": "a:3"})], path=path)
    if not passes_vllm_xargs(path):  # Anthropic's, in older vLLM versions
        assert replies[0]["status"] == 400
        return
    assert load(inside.body) == {"vllm_xargs": {"steer": "a:3"}}


@pytest.mark.parametrize(
    "fields",
    [{"steer": "a:3"}, {"vllm_xargs": {"steer": "a:3"}}, {"model": "base:friendly"}],
    ids=["field", "argument", "preset-model"],
)
def test_a_route_that_cannot_carry_a_steer_refuses_every_form_of_request(
    plan: Any, fields: dict[str, Any]
) -> None:
    """A route that generates and has no ``vllm_xargs``: a steer would be lost."""
    inside, replies = run(plan, [dump(fields)], path="/generative_scoring")
    assert inside.scope is None
    assert replies[0]["status"] == 400


@pytest.mark.parametrize(
    ("fields", "extra_args"),
    [
        ({"steer": "a:3"}, {"steer": "a:3"}),
        ({"steer": {"a": 3}, "steer_strengths": True}, {"steer": '{"a": 3}'}),
        ({"model": "base:friendly"}, {"steer": "friendly"}),
        ({"model": "base:friendly", "steer": "none"}, {"steer": "none"}),
    ],
    ids=["field", "object", "preset-model", "overridden-preset"],
)
@pytest.mark.parametrize("params", [{}, {"max_tokens": 2, "extra_args": {"x": 1}}], ids=str)
def test_the_token_route_gets_a_steer_in_its_extra_args(
    plan: Any, fields: dict[str, Any], extra_args: dict[str, Any], params: dict[str, Any]
) -> None:
    body = {"token_ids": [1], "sampling_params": params, **fields}
    inside, _ = run(plan, [dump(body)], path="/inference/v1/generate")
    passed = load(inside.body)["sampling_params"]
    passed["extra_args"].pop("steer_strengths", None)
    assert passed == {**params, "extra_args": {**params.get("extra_args", {}), **extra_args}}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"vllm_xargs": {"steer": "a:3"}}, "vllm_xargs.steer", "or in sampling_params.extra_args"),
        ({"steer": "z:3"}, "steer", "steer 'z' is unknown"),
        ({"steer": "a", "sampling_params": 5}, "sampling_params", "expected an object"),
        ({"steer": "a", "sampling_params": None}, "sampling_params", "is missing"),
        (
            {"steer": "a", "sampling_params": {"extra_args": {"steer": "a"}}},
            "steer",
            "both as a field and in sampling_params.extra_args",
        ),
        (
            {"steer": "a", "sampling_params": {"extra_args": "x"}},
            "sampling_params.extra_args",
            "expected an object",
        ),
        (
            {"sampling_params": {"steer": "a"}},
            "sampling_params.steer",
            "or in sampling_params.extra_args",
        ),
    ],
)
def test_the_token_route_refuses_a_steer_that_it_cannot_carry(
    plan: Any, fields: dict[str, Any], param: str, message: str
) -> None:
    body = {"token_ids": [1], "sampling_params": {}, **fields}
    inside, (_, reply) = run(plan, [dump(body)], path="/inference/v1/generate")
    assert inside.scope is None
    error = json.loads(reply["body"])["error"]
    assert error["param"] == param
    assert message in error["message"]


REFUSAL = "steer: this route does not support steering; remove the steer and name the base model"


@pytest.mark.parametrize("path", ["/generative_scoring", "/prefix/v1/chat/completions/render"])
def test_a_refusal_is_an_openai_error_and_does_not_reach_the_application(
    plan: Any, path: str
) -> None:
    inside, replies = run(plan, [dump({"steer": "a:3"})], path=path)
    assert inside.scope is None
    start, body = replies
    assert start["status"] == 400
    assert dict(start["headers"])[b"content-type"] == b"application/json"
    assert dict(start["headers"])[b"content-length"] == str(len(body["body"])).encode()
    assert json.loads(body["body"])["error"] == {
        "message": REFUSAL,
        "type": "BadRequestError",
        "param": "steer",
        "code": 400,
    }


def test_a_refusal_on_the_anthropic_route_has_its_format(plan: Any) -> None:
    from vllm.entrypoints.anthropic.protocol import AnthropicError, AnthropicErrorResponse

    _, (start, body) = run(plan, [dump({"steer": "b:3"})], path="/v1/messages")
    assert start["status"] == 400
    result = json.loads(body["body"])
    message = result["error"]["message"]
    error = AnthropicError(type="BadRequestError", message=message)
    assert result == AnthropicErrorResponse(error=error).model_dump()
    unknown = "steer 'b' is unknown; steers: a; presets: friendly, v1"
    assert message == (unknown if passes_vllm_xargs("/v1/messages") else REFUSAL)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"steer": "b"}, "steer"),
        ({"vllm_xargs": {"steer": "b"}}, "vllm_xargs.steer"),
        ({"steer_strengths": 5}, "steer_strengths"),
        ({"steer": "a", "vllm_xargs": 5}, "vllm_xargs"),
        ({"steers": "a"}, "steers"),
        ({"vllm_xargs": {"vllm_steer_stream": {}}}, "vllm_xargs.vllm_steer_stream"),
        ({"vllm_xargs": {"steer_strengths": 5}}, "vllm_xargs.steer_strengths"),
        ({"steer": "a", "steer_strengths": "perhaps"}, "steer_strengths"),
        ({"steer": {"a": 1}, "vllm_xargs": {"steer": "a"}}, "steer"),
        ({"model": "base:friendly", "use_beam_search": True}, "model"),
        ({"steer": "a:2", "use_beam_search": True}, "steer"),
        ({"vllm_xargs": {"Steer": "a"}}, "vllm_xargs.Steer"),
    ],
    ids=str,
)
def test_a_refusal_names_the_field_that_was_sent(plan: Any, body: Any, param: str) -> None:
    _, (_, replies) = run(plan, [dump(body)])
    assert json.loads(replies["body"])["error"]["param"] == param


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"steer": "a"}, "steer"),
        ({"vllm_xargs": {"steer": "a"}}, "vllm_xargs.steer"),
        ({"model": "base:friendly"}, "model"),
    ],
    ids=str,
)
def test_admission_names_the_field_that_was_sent(plan: Any, body: Any, field: str) -> None:
    from vllm_steer.serving.http.body_rewrite import rewrite
    from vllm_steer.serving.http.json_members import MemberReader
    from vllm_steer.serving.http.routes import Route
    from vllm_steer.serving.request_args import SENT_FIELDS, RejectedSteer

    members = MemberReader(("steer", "vllm_xargs", "model")).read(dump(body))
    replies = SENT_FIELDS.set(rewrite(members, plan, Route(passes_vllm_xargs=True)).fields)
    try:
        assert RejectedSteer("the engine cannot serve it").parameter == field
    finally:
        SENT_FIELDS.reset(replies)
    assert RejectedSteer("the engine cannot serve it").parameter == "vllm_xargs.steer"
