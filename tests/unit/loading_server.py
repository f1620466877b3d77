"""A server of the tests of loading over HTTP: real middleware, fake engines."""

import asyncio
import base64
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from engine_tools import engine_config
from loading_tools import FakeEngines, fake_engines, loading_plan

from vllm_steer.plan import SteerPlan
from vllm_steer.runtime.registry import Registry
from vllm_steer.serving.http import SteerMiddleware
from vllm_steer.serving.plan_transport import plan_of
from vllm_steer.serving.runtime import names, server
from vllm_steer.serving.runtime.loading import SteerLoading

KEY = "a key"
LOAD, UNLOAD, COMPLETIONS = "/v1/load_steer", "/v1/unload_steer", "/v1/completions"


class Answer:
    def __init__(self, messages: list[Any]) -> None:
        self.status: int = messages[0]["status"]
        self.headers = {n.lower().decode(): v.decode() for n, v in messages[0]["headers"]}
        self.body = json.loads(b"".join(m.get("body", b"") for m in messages[1:]) or b"null")

    @property
    def message(self) -> str:
        return str(self.body["error"]["message"])


class FakeServer:
    """The middleware around an application that notes what vLLM would get."""

    def __init__(self, plan: SteerPlan, folder: Path, engines: FakeEngines) -> None:
        config = engine_config(plan)
        self.plan = plan_of(config)
        assert self.plan is not None
        self.loading = SteerLoading(self.plan, config, Registry(folder), engines)
        names._registries[id(self.plan)] = self.plan, self.loading.registry
        client = SimpleNamespace(vllm_config=config, **{server._LOADING: self.loading})
        self.state = SimpleNamespace(vllm_config=config, engine_client=client)
        self.router = SimpleNamespace(middleware_stack=self.serve)
        self.got: list[Any] = []
        self.status = 200
        self.doses: Any = None

    async def serve(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.got.append(json.loads(body) if body else None)
        sent = (self.got[-1] or {}).get("vllm_xargs") or {}
        self.doses = names.doses_now(sent.get("steer"), self.plan)  # type: ignore[arg-type]
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    def post(self, path: str, body: Any, *, key: str | None = KEY, method: str = "POST") -> Answer:
        return asyncio.run(self.answer(path, body, key=key, method=method))

    async def answer(
        self, path: str, body: Any, *, key: str | None = KEY, method: str = "POST"
    ) -> Answer:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": content, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await self.router.middleware_stack(scope, receive, send)

        headers = [(b"content-type", b"application/json")]
        if key is not None:
            headers.append((b"authorization", f"Bearer {key}".encode()))
        scope = {"type": "http", "method": method, "path": path, "headers": headers, "app": self}
        await SteerMiddleware(app)(scope, receive, send)
        return Answer(sent)


def fake_server(tmp_path: Path, **runtime: Any) -> FakeServer:
    plan = loading_plan(**runtime)
    folder = tmp_path / "loaded"
    folder.mkdir(exist_ok=True)
    return FakeServer(plan, folder, fake_engines(plan))


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
