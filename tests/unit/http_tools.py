"""Helpers for the tests of the middleware."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any, NamedTuple

from vllm_steer.config import Limits
from vllm_steer.plan import PlannedSteer, SteerPlan
from vllm_steer.serving.http import Steering
from vllm_steer.serving.http.body_rewrite import BODY
from vllm_steer.serving.http.body_rewrite import rewrite as rewrite_body
from vllm_steer.serving.http.request_body import ReceivedBody, SteerHints
from vllm_steer.serving.http.routes import route_at


def passes_vllm_xargs(path: str) -> bool:
    route = route_at(path)
    return route is not None and route.passes_vllm_xargs


def load(body: bytes) -> Any:
    """A body as vLLM reads it, without fields of ours that are empty."""
    data = json.loads(body)
    return {k: v for k, v in data.items() if v is not None or k not in ("steer", "steer_strengths")}


def dump(body: Any) -> bytes:
    return json.dumps(body).encode()


def make_plan() -> SteerPlan:
    steer = PlannedSteer(
        path="/x",  # type: ignore[arg-type]
        overrides={},
        kind="lm_steer",
        site="head",
        hidden_size=6,
        default_strength=1.0,
        content="a",
    )
    return SteerPlan(
        version="0",
        kernels="auto",
        steers={"a": steer, "b": steer},
        presets={"friendly": {"a": 3.0}},
        default="none",
        limits=Limits(),
    )


PLAN = make_plan()
CONFIG = SimpleNamespace(
    additional_config={"steer": PLAN.to_json()},
    speculative_config=None,
    lora_config=None,
)
JSON = b"application/json"


class Passed:
    """The input of the application: chunks, headers and whether the rest of a body arrived."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []
        self.headers: Any = None
        self.last: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.headers = scope["headers"]
        more = True
        while more:
            self.last = await receive()
            if self.last["type"] != "http.request":
                break
            self.chunks.append(self.last["body"])
            more = self.last["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


def send_chunks(
    chunks: list[bytes],
    *,
    path: str = "/v1/completions",
    method: str = "POST",
    content_type: bytes | None = JSON,
    cut: bool = False,
) -> tuple[int, Passed, int, bytes]:
    """One request: its status, what the application got, messages that were received before it,
    and the body of the response.
    """
    waiting = [
        {"type": "http.request", "body": chunk, "more_body": cut or at + 1 < len(chunks)}
        for at, chunk in enumerate(chunks)
    ] + [{"type": "http.disconnect"}]
    passed, messages = Passed(), []
    received_before: list[int] = []

    async def receive() -> Any:
        return waiting.pop(0)

    async def send(message: Any) -> None:
        messages.append(message)

    async def inside(scope: Any, receive: Any, send: Any) -> None:
        received_before.append(len(chunks) + 1 - len(waiting))
        await passed(scope, receive, send)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [] if content_type is None else [(b"content-type", content_type)],
        "app": SimpleNamespace(state=SimpleNamespace(vllm_config=CONFIG)),
    }
    asyncio.run(Steering(inside)(scope, receive, send))
    received = received_before[0] if received_before else len(chunks)
    return messages[0]["status"], passed, received, messages[1]["body"]


def post(body: bytes) -> tuple[int, bytes]:
    status, passed, _, _ = send_chunks([body])
    return status, b"".join(passed.chunks)


class Rewritten(NamedTuple):
    body: bytes
    reports: bool


def rewritten(body: bytes, plan: Any, *, route: str) -> Rewritten:
    """The rewritten body; the same object if nothing changes."""
    members, text = BODY.read_slowly(body)
    if members is None:
        return Rewritten(body, False)
    route_entry = route_at(route)
    assert route_entry is not None
    request_fields = rewrite_body(members, plan, route_entry)
    if not request_fields.members:
        return Rewritten(body, request_fields.reports)
    received = ReceivedBody(SteerHints())
    received.append(request_fields.members, to=text or body)
    return Rewritten(received.whole(), request_fields.reports)


def rewrite(body: bytes, plan: Any, *, route: str) -> bytes:
    return rewritten(body, plan, route=route).body
