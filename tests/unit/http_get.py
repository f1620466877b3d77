"""A GET request through the middleware, to an application that says whether it was reached."""

import asyncio
from types import SimpleNamespace
from typing import Any, NamedTuple

from vllm_steer.plan import SteerPlan
from vllm_steer.serving.http import Steering


class Reply(NamedTuple):
    """A response; ``passed_on`` if the application gave it and not the plugin."""

    status: int
    headers: dict[str, str]
    body: bytes
    passed_on: bool


def get(plan: SteerPlan | None, path: str, *, method: str = "GET", root_path: str = "") -> Reply:
    """The response to a request without a body."""
    additional = {} if plan is None else {"steer": plan.to_json()}
    config = SimpleNamespace(additional_config=additional)
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "root_path": root_path,
        "headers": [],
        "app": SimpleNamespace(state=SimpleNamespace(vllm_config=config)),
    }
    sent: list[Any] = []
    reached: list[str] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    async def application(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["path"])
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    asyncio.run(Steering(application)(scope, receive, send))
    start, body = sent
    headers = {name.decode(): value.decode() for name, value in start["headers"]}
    return Reply(start["status"], headers, body["body"], bool(reached))
