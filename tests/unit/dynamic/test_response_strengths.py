"""Strengths in HTTP responses: a server's handlers over vLLM's own queues, behind the middleware.

The server is Starlette with handlers that answer as vLLM's do; the engine is a script of tokens and
strengths. Each token's text is its number, so a chunk says which strengths belong to it.
"""

import asyncio
import inspect
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from engine_tools import engine_config
from reported import DELTA, FINAL, add, params, step
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from vllm.utils.async_utils import merge_async_iterators
from vllm.v1.engine.output_processor import (
    OutputProcessor,
    RequestOutputCollector,
    RequestState,
)

from vllm_steer.compat.patching import wrap
from vllm_steer.serving.http import SteerMiddleware
from vllm_steer.serving.reporting_state import REPORTING
from vllm_steer.serving.strength_reports import outputs
from vllm_steer.serving.strength_reports.delivery import RESPONSE_STRENGTHS, ResponseStrengths
from vllm_steer.serving.strength_reports.http_response import StrengthsInResponse

PATCHES = (
    (OutputProcessor, "add_request", outputs.with_sequence_strengths),
    (OutputProcessor, "process_outputs", outputs.with_strengths_taken),
    (RequestState, "_new_completion_output", outputs.with_strengths_on_completion),
)
LENGTHS = [3, 5, 2, 4]
"""Tokens of a response's choices, by choice."""


def strength_of(choice: int, at: int) -> float:
    return choice + at / 8


def all_of(choice: int) -> list[float]:
    return [strength_of(choice, at) for at in range(LENGTHS[choice])]


class Server:
    """Handlers for completions, chat and responses, with the engine that they ask."""

    def __init__(self, *, hurry: bool) -> None:
        self.hurry = hurry
        self.processor = OutputProcessor(None, log_stats=False)
        self.tasks: list[asyncio.Task[None]] = []
        self.seen: list[dict[str, Any]] = []

    async def completions(self, request: Any) -> Any:
        body = await request.json()
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        names = [f"cmpl-x-{at}" for at in range(len(prompts))]
        return await self.answer(body, "cmpl-x", names, chat=False)

    async def chat(self, request: Any) -> Any:
        return await self.answer(await request.json(), "chatcmpl-x_1", ["chatcmpl-x_1"], chat=True)

    async def batch(self, request: Any) -> Any:
        names = ["chatcmpl-x_0", "chatcmpl-x_1"]
        return await self.answer(await request.json(), "chatcmpl-x", names, chat=True)

    async def responses(self, request: Any) -> Any:
        body = await request.json()
        self.seen.append(body)
        merged = merge_async_iterators(self.consume(body, "resp_x_0", 0, 1))
        if not body.get("stream"):
            async for _ in merged:
                pass
            return JSONResponse({"id": "resp_x", "object": "response", "output": []})

        async def events() -> AsyncIterator[str]:
            async for _ in merged:
                yield 'event: response.delta\ndata: {"type":"response.delta"}\n\n'
            end = {"type": "response.completed", "response": {"id": "resp_x"}}
            yield f"event: response.completed\ndata: {json.dumps(end)}\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    async def answer(
        self, body: dict[str, Any], request_id: str, names: list[str], *, chat: bool
    ) -> Any:
        self.seen.append(body)
        n = body.get("n", 1)
        if body.get("fail"):
            return JSONResponse({"error": {"message": "no"}}, status_code=400)
        merged = merge_async_iterators(
            *(self.consume(body, name, at, n) for at, name in enumerate(names))
        )
        if body.get("stream"):
            chunks = stream_chunks(merged, request_id, n, chat=chat)
            return StreamingResponse(chunks, media_type="text/event-stream")
        whole = dict([pair async for pair in merged])
        choices = [
            {
                "index": prompt * n + c.index,
                "text": str(list(c.token_ids)),
                "finish_reason": "length",
            }
            for prompt in sorted(whole)
            for c in whole[prompt].outputs
        ]
        return JSONResponse({"id": request_id, "choices": choices, "note": "Wörter"})

    async def consume(self, body: Any, name: str, prompt: int, n: int) -> AsyncIterator[Any]:
        """``AsyncLLM.generate``: the queue is made in the first step of the iteration."""
        kind = DELTA if body.get("stream") else FINAL
        queue = RequestOutputCollector(kind, name)
        sampling = params(kind, n=n, extra_args=body.get("vllm_xargs"))
        states = add(self.processor, sampling, name=name, queue=queue)
        run = self.run({state: prompt * n + at for at, state in enumerate(states)})
        self.tasks.append(asyncio.create_task(run))
        finished = False
        while not finished:
            output = queue.get_nowait() or await queue.get()
            finished = output.finished
            yield output

    async def run(self, choices: dict[str, int]) -> None:
        """The engine: a token for each sequence per step, at once or as they are taken."""
        for at in range(max(LENGTHS)):
            alive = {name: choice for name, choice in choices.items() if at < LENGTHS[choice]}
            tokens = {name: (at, strength_of(choice, at)) for name, choice in alive.items()}
            last = [name for name, choice in alive.items() if at + 1 == LENGTHS[choice]]
            step(self.processor, tokens, last=last)
            if not self.hurry:
                await asyncio.sleep(0.001)


async def stream_chunks(merged: Any, own: str, n: int, *, chat: bool) -> AsyncIterator[str]:
    def line(choice: dict[str, Any]) -> str:
        return f"data: {json.dumps({'id': own, 'choices': [choice]})}\n\n"

    begun = False
    async for prompt, output in merged:
        if chat and not begun:
            for index in range(n):
                yield line({"index": index, "delta": {"role": "assistant", "content": ""}})
            begun = True
        for c in output.outputs:
            text = json.dumps(list(c.token_ids))
            field = {"delta": {"content": text}} if chat else {"text": text}
            yield line({"index": prompt * n + c.index, **field})
    yield f"data: {json.dumps({'id': own, 'choices': [], 'usage': {}})}\n\n"
    yield "data: [DONE]\n\n"


@pytest.fixture(params=[False, True], ids=["in-step", "lagging"])
def server(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, make_plan: Any
) -> Server:
    """With an engine that waits for the consumer, or one that is done before it begins."""
    for owner, name, around in PATCHES:
        monkeypatch.setattr(owner, name, inspect.unwrap(getattr(owner, name)))
        wrap(owner, name, around)
    monkeypatch.setattr(REPORTING, "is_enabled", False)
    monkeypatch.setattr(REPORTING, "plan", make_plan({"a": 1.0}))
    return Server(hurry=request.param)


def post(server: Server, path: str, body: dict[str, Any]) -> httpx.Response:
    async def ask() -> httpx.Response:
        app = Starlette(
            routes=[
                Route("/v1/completions", server.completions, methods=["POST"]),
                Route("/v1/chat/completions", server.chat, methods=["POST"]),
                Route("/v1/chat/completions/batch", server.batch, methods=["POST"]),
                Route("/v1/responses", server.responses, methods=["POST"]),
            ]
        )
        assert REPORTING.plan is not None
        app.state.vllm_config = engine_config(REPORTING.plan)
        app.add_middleware(SteerMiddleware)
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            reply = await client.post(path, json=body)
        await asyncio.gather(*server.tasks)
        assert RESPONSE_STRENGTHS.get() is None
        return reply

    return asyncio.run(ask())


REQUEST = {"steer": "a:dynamic", "steer_strengths": True}


def events_of(reply: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def tokens_of(choice: dict[str, Any]) -> list[int]:
    text = choice["text"] if "text" in choice else choice["delta"]["content"]
    return list(json.loads(text or "[]"))


@pytest.mark.parametrize(
    "request_fields",
    [
        REQUEST,
        {"vllm_xargs": {"steer": "a:dynamic", "steer_strengths": 1}},
        {"steer": "a:dynamic", "vllm_xargs": {"steer_strengths": True}},
    ],
    ids=["field", "argument", "one-of-each"],
)
def test_a_whole_response_has_the_strengths_of_its_choice(
    server: Server, request_fields: dict[str, Any]
) -> None:
    reply = post(server, "/v1/completions", {"prompt": "x", **request_fields})
    (choice,) = reply.json()["choices"]
    assert choice["steer_strengths"] == {"a": all_of(0)}
    assert choice["text"] == "[0, 1, 2]"
    assert reply.json()["note"] == "Wörter"
    assert int(reply.headers["content-length"]) == len(reply.content)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ["x", "y"], "n": 2}),
        ("/v1/completions", {"prompt": ["x", "y", "z", "w"]}),
        ("/v1/completions", {"prompt": "x", "n": 4}),
        ("/v1/chat/completions", {"n": 3}),
        ("/v1/chat/completions/batch", {"n": 2}),
    ],
    ids=["two-by-two", "four-prompts", "n-four", "chat", "chat-batch"],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_each_choice_has_the_strengths_of_its_own_tokens(
    server: Server, path: str, body: dict[str, Any], stream: bool
) -> None:
    reply = post(server, path, {**REQUEST, **body, "stream": stream})
    strengths: dict[int, list[float]] = {}
    events = events_of(reply) if stream else [reply.json()]
    for choice in (choice for event in events for choice in event["choices"]):
        new = choice["steer_strengths"].get("a", [])
        if stream:
            tokens = tokens_of(choice)
            assert new == [strength_of(choice["index"], at) for at in tokens]
        strengths.setdefault(choice["index"], []).extend(new)
    assert len(strengths) == body.get("n", 1) * (2 if path.endswith("batch") else 1) * (
        len(body["prompt"]) if isinstance(body.get("prompt"), list) else 1
    )
    assert strengths == {choice: all_of(choice) for choice in strengths}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_response_without_choices_has_the_strengths_once(server: Server, stream: bool) -> None:
    reply = post(server, "/v1/responses", {**REQUEST, "stream": stream})
    if not stream:
        assert reply.json()["steer_strengths"] == {"a": all_of(0)}
        return
    events = [line[6:] for line in reply.text.split("\n") if line.startswith("data: ")]
    assert all("steer_strengths" not in event for event in events[:-1])
    assert json.loads(events[-1])["response"]["steer_strengths"] == {"a": all_of(0)}
    assert reply.text.count("event: response.completed\n") == 1


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    "request_fields", [{}, {"steer_strengths": False}], ids=["silent", "false"]
)
def test_a_request_without_steer_strengths_gets_the_bytes_of_stock_vllm(
    server: Server, stream: bool, request_fields: dict[str, Any]
) -> None:
    body = {"prompt": "x", "steer": "a:dynamic", "stream": stream}
    reply = post(server, "/v1/completions", {**body, **request_fields})
    assert b"steer_strengths" not in reply.content
    assert reply.text.endswith('"note":"Wörter"}' if not stream else "data: [DONE]\n\n")


def test_an_error_passes_unchanged(server: Server) -> None:
    reply = post(server, "/v1/completions", {"prompt": "x", "fail": True, **REQUEST})
    assert (reply.status_code, reply.text) == (400, '{"error":{"message":"no"}}')


def sent_through(messages: list[dict[str, Any]]) -> list[Any]:
    delivered = ResponseStrengths()
    delivered.expect("x", 1)
    delivered.put("x", 0, {"a": [0.5]}, delta=True)
    events: list[Any] = []

    async def send(message: Any) -> None:
        events.append(message)

    async def run() -> None:
        reporting = StrengthsInResponse(send, delivered)
        for message in messages:
            await reporting(message)

    asyncio.run(run())
    return events


def response_of(kind: bytes, parts: list[bytes], **fields: Any) -> list[dict[str, Any]]:
    start = {"status": 200, "headers": [(b"Content-Type", kind), (b"x-other", b"kept")], **fields}
    return [
        {"type": "http.response.start", **start},
        *(
            {"type": "http.response.body", "body": part, "more_body": at + 1 < len(parts)}
            for at, part in enumerate(parts)
        ),
    ]


CHUNK = b'data: {"id":"x","choices":[{"index":0,"text":"\xc3\xa4"}]}\n\ndata: [DONE]\n\n'
WITH = (
    b'data: {"id":"x","choices":[{"index":0,"text":"\xc3\xa4","steer_strengths":{"a":[0.5]}}]}\n\n'
    b"data: [DONE]\n\n"
)


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_events_split_at_any_byte_are_the_same_events(size: int) -> None:
    parts = [CHUNK[at : at + size] for at in range(0, len(CHUNK), size)]
    messages = sent_through(response_of(b"text/event-stream; charset=utf-8", parts))
    assert b"".join(message.get("body", b"") for message in messages) == WITH
    assert [m["more_body"] for m in messages[1:]] == [True] * (len(messages) - 2) + [False]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_json_body_split_at_any_byte_is_sent_whole_with_its_length(size: int) -> None:
    body = b'{"id":"x","choices":[{"index":0}]}'
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    start, whole = sent_through(response_of(b"application/json", parts))
    assert json.loads(whole["body"])["choices"][0]["steer_strengths"] == {"a": [0.5]}
    assert dict(start["headers"])[b"content-length"] == b"%d" % len(whole["body"])
    assert dict(start["headers"])[b"x-other"] == b"kept"


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (b"text/plain", {}),
        (b"application/json", {"status": 400}),
        (b"text/event-stream", {"status": 503}),
        (b"application/json", {"headers": [(b"content-type", b"application/json"),
                                           (b"content-encoding", b"gzip")]}),
    ],
    ids=["text", "json-error", "stream-error", "compressed"],
)  # fmt: skip
def test_other_responses_pass_unchanged_message_by_message(
    kind: bytes, fields: dict[str, Any]
) -> None:
    messages = response_of(kind, [b'{"choices":', b"[]}"], **fields)
    assert sent_through(messages) == messages


@pytest.mark.parametrize(
    "body",
    [b"[1]", b'{"object":"list"}', b'{"choices":[]}', b'{"error":{"message":"no"}}'],
    ids=bytes.decode,
)
def test_json_without_a_place_for_strengths_keeps_its_bytes(body: bytes) -> None:
    assert sent_through(response_of(b"application/json", [body]))[1]["body"] == body
