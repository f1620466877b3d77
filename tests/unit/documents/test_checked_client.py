"""The example of a client that refuses unsteered answers, against a server that can be either."""

import json
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import openai
import pytest

sys.path.append(str(Path(__file__).parents[3] / "docs" / "examples"))
from checked_client import NotSteered, check_steered, steered

HEADER = "detox:5@0123456789ab,humor:dynamic@ba9876543210"
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


class Handler(BaseHTTPRequestHandler):
    """Answers a chat as vLLM does; with the header ``X-Steer`` if the server has one."""

    server: "Server"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append(body)
        streams = body.get("stream", False)
        kind = "text/event-stream" if streams else "application/json"
        self.send_response(200)
        self.send_header("content-type", kind)
        if self.server.header is not None:
            self.send_header("X-Steer", self.server.header)
        data = (
            self._events() if streams else json.dumps(self._answer("message", "Good day")).encode()
        )
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _answer(self, field: str, text: str) -> dict[str, Any]:
        choice = {
            "index": 0,
            field: {"role": "assistant", "content": text},
            "finish_reason": "stop",
        }
        kind = "chat.completion" if field == "message" else "chat.completion.chunk"
        return {"id": "1", "object": kind, "created": 0, "model": "m", "choices": [choice]}

    def _events(self) -> bytes:
        parts = [json.dumps(self._answer("delta", text)) for text in ("Good ", "day")]
        return "".join(f"data: {part}\n\n" for part in [*parts, "[DONE]"]).encode()

    def log_message(self, *_: Any) -> None:
        """Nothing on standard error."""


class Server(ThreadingHTTPServer):
    """On a free port of loopback."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.header: str | None = None
        self.bodies: list[dict[str, Any]] = []


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    url = f"http://127.0.0.1:{server.server_port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=10) as client:
        yield client


def text_of(answer: Any, *, streams: bool) -> str:
    if not streams:
        return str(answer.choices[0].message.content)
    return "".join(chunk.choices[0].delta.content for chunk in answer)


each_way = pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])


@each_way
def test_a_steered_answer_is_handed_out(
    server: Server, client: openai.OpenAI, streams: bool
) -> None:
    server.header = HEADER
    more = {"stream": True} if streams else {}
    answer = steered(client, {"detox": 5}, required={"detox": "0123"}, **CHAT, **more)
    assert text_of(answer, streams=streams) == "Good day"
    assert server.bodies[0]["steer"] == {"detox": 5}
    assert server.bodies[0]["messages"] == CHAT["messages"]


@each_way
@pytest.mark.parametrize(
    ("header", "message"),
    [
        (None, "has no header X-Steer: this server does not steer"),
        ("none", "the server applied no steer"),
        ("humor:1@ba9876543210", "detox@0123 was asked for"),
        ("detox:5@ffff00000000", "detox@0123 was asked for"),
    ],
    ids=["no-plugin", "none", "another", "another-file"],
)
def test_an_answer_that_is_not_steered_as_asked_is_refused(
    server: Server, client: openai.OpenAI, streams: bool, header: str | None, message: str
) -> None:
    server.header = header
    more = {"stream": True} if streams else {}
    with pytest.raises(NotSteered, match=message):
        steered(client, "detox:5", required={"detox": "0123"}, **CHAT, **more)


def test_the_header_names_each_steer_with_its_digest() -> None:
    check_steered(HEADER, {})
    check_steered(HEADER, {"detox": "0123456789ab", "humor": ""})
    with pytest.raises(NotSteered, match="anger was asked for"):
        check_steered(HEADER, {"anger": ""})
