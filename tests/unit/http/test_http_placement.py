"""The position of the middleware: after the check of API keys and after all other middlewares."""

import asyncio
import importlib
import inspect
import json
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware

from vllm_steer.serving.http import Steering, SteerMiddleware

KEY = "secret"
OURS = "vllm_steer.serving.http.SteerMiddleware"
HERE = __name__
created: list[str] = []
calls: list[Any] = []


class Plain:
    """A user's ASGI middleware that may be built once only, as one with metrics may."""

    def __init__(self, app: Any) -> None:
        created.append("plain")
        self.inner = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        calls.append(("plain", scope["type"]))
        await self.inner(scope, receive, send)


class Reading(BaseHTTPMiddleware):
    """A user's middleware that reads the body before the application does."""

    def __init__(self, app: Any) -> None:
        created.append("reading")
        super().__init__(app)

    async def dispatch(self, request: Request, call_next: Any) -> Any:
        calls.append(("reading", await request.body()))
        return await call_next(request)


async def function(request: Request, call_next: Any) -> Any:
    calls.append(("function", request.url.path))
    return await call_next(request)


class Compressing(GZipMiddleware):
    def __init__(self, app: Any) -> None:
        created.append("compressing")
        super().__init__(app, minimum_size=1)


@pytest.fixture(autouse=True)
def empty() -> None:
    created.clear()
    calls.clear()


def application(plan: Any, middleware: list[str], api_key: list[str] | None) -> FastAPI:
    """An application with vLLM's check of API keys and the given middlewares, in vLLM's order."""
    app = FastAPI()

    @app.post("/v1/completions")
    async def completions(request: Request) -> Any:
        return {"body": await request.json(), "served": "x" * 500}

    app.add_middleware(CORSMiddleware, allow_origins=["*"])
    if api_key:
        app.add_middleware(authentication(), tokens=api_key)
    for name in middleware:
        module, _, attribute = name.rpartition(".")
        imported = getattr(importlib.import_module(module), attribute)
        if inspect.isclass(imported):
            app.add_middleware(imported)
        else:
            app.middleware("http")(imported)
    app.state.vllm_config = SimpleNamespace(additional_config={"steer": plan.to_json()})
    return app


def authentication() -> Any:
    """vLLM's own check of API keys."""
    try:
        from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
    except ImportError:  # where older versions have it
        from vllm.entrypoints.serve.utils.server_utils import AuthenticationMiddleware
    return AuthenticationMiddleware


def post(app: FastAPI, *keys: str, body: Any) -> list[httpx.Response]:
    """One request per key, all at once."""

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            is_asked = (
                client.post(
                    "/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"}
                )
                for key in keys
            )
            return list(await asyncio.gather(*is_asked))

    return asyncio.run(ask())


@pytest.fixture
def plan(make_plan: Any) -> Any:
    return make_plan({"a": 1.0}, presets={"friendly": {"a": 3.0}})


USERS = [f"{HERE}.{name}" for name in ("Plain", "Reading", "function", "Compressing")]


@pytest.mark.parametrize("ours_at", range(len(USERS) + 1))
def test_the_middleware_runs_last_for_any_position_of_the_flag(plan: Any, ours_at: int) -> None:
    app = application(plan, [*USERS[:ours_at], OURS, *USERS[ours_at:]], [KEY])
    served, refused = (
        *post(app, KEY, body={"prompt": "x", "steer": "a:3"}),
        *post(app, KEY, body={"prompt": "x", "steer": "b"}),
    )
    assert served.status_code == 200
    assert served.json()["body"]["vllm_xargs"] == {"steer": "a:3"}
    assert served.headers["content-encoding"] == "gzip"
    assert refused.status_code == 400
    assert "'b' is unknown" in refused.json()["error"]["message"]
    assert sorted(created) == ["compressing", "plain", "reading"]
    names = [name for name, _ in calls]
    assert names.count("plain") == names.count("reading") == names.count("function") == 2
    bodies = [json.loads(body) for name, body in calls if name == "reading"]
    assert [body["steer"] for body in bodies] == ["a:3", "b"]


def test_a_request_without_the_key_is_not_read(plan: Any) -> None:
    app = application(plan, [OURS], [KEY])
    messages: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("the body was asked for")

    async def send(message: Any) -> None:
        messages.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"authorization", b"Bearer wrong")],
    }
    for _ in range(2):  # the first request moves the middleware
        asyncio.run(app(dict(scope), receive, send))
    assert [message["status"] for message in messages if "status" in message] == [401, 401]


def test_concurrent_first_requests_add_one_middleware(plan: Any) -> None:
    app = application(plan, [OURS, USERS[0]], [KEY])
    replies = post(app, *[KEY] * 8, body={"prompt": "x", "steer": "a:3"})
    for reply in replies:
        assert reply.json()["body"]["vllm_xargs"] == {"steer": "a:3"}
    assert created == ["plain"]
    stack = app.router.middleware_stack
    assert isinstance(stack, Steering)
    assert not isinstance(stack._app, Steering)


def test_the_lifespan_adds_the_middleware_before_any_request(plan: Any) -> None:
    app = application(plan, [OURS], None)
    messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    replies: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        replies.append(message["type"])

    asyncio.run(app({"type": "lifespan"}, receive, send))
    assert replies == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert isinstance(app.router.middleware_stack, Steering)


def test_a_middleware_given_twice_steers_once(plan: Any) -> None:
    app = application(plan, [OURS, OURS], None)
    assert SteerMiddleware is not Steering
    (reply,) = post(app, KEY, body={"prompt": "x", "steer": {"a": 3}})
    assert reply.json()["body"]["vllm_xargs"] == {"steer": '{"a":3}'}
