"""Strengths in HTTP responses: JSON bodies and server-sent events."""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from vllm_steer.serving.request_args import STRENGTHS
from vllm_steer.serving.strength_reports.delivery import ResponseStrengths

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

DATA = b"data: {"
LAST_EVENTS = ("response.completed", "response.incomplete", "response.failed")


class StrengthsInResponse:
    """An ASGI ``send`` that adds ``steer_strengths`` to every choice of a response.

    A whole JSON body is kept until it is complete; events are passed on line by line. Whatever is
    not a successful response of one of these two kinds passes as it is.
    """

    def __init__(self, send: Send, delivered: ResponseStrengths) -> None:
        self._send = send
        self._delivered = delivered
        self._pass_on: Send = send
        self._start: Message = {}
        self._kept = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif message["type"] == "http.response.body":
            await self._pass_on(message)
        else:
            await self._send(message)

    async def _begin(self, start: Message) -> None:
        headers = {name.lower(): value for name, value in start["headers"]}
        kind = headers.get(b"content-type", b"")
        if start["status"] != 200 or b"content-encoding" in headers:
            kind = b""
        self._start = start
        if kind.startswith(b"application/json"):
            self._pass_on = self._whole
            return
        if kind.startswith(b"text/event-stream"):
            self._pass_on = self._events
        await self._send(start)

    async def _whole(self, message: Message) -> None:
        self._kept += message.get("body", b"")
        if message.get("more_body"):
            return
        body = self._with_strengths(self._kept)
        await self._send({**self._start, "headers": with_length(self._start["headers"], len(body))})
        await self._send({**message, "body": body})

    async def _events(self, message: Message) -> None:
        complete, newline, remainder = (self._kept + message.get("body", b"")).rpartition(b"\n")
        if not message.get("more_body"):
            complete, remainder = complete + newline + remainder, b""
        else:
            complete += newline
        self._kept = remainder
        lines = [self._event_line(line) for line in complete.split(b"\n")]
        if complete or not message.get("more_body"):
            await self._send({**message, "body": b"\n".join(lines)})

    def _event_line(self, line: bytes) -> bytes:
        if not line.startswith(DATA):
            return line
        start = len(DATA) - 1
        return line[:start] + self._with_strengths(line[start:])

    def _with_strengths(self, text: bytes) -> bytes:
        data = json.loads(text)
        if not add_strengths(data, self._delivered):
            return text
        return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


def add_strengths(data: Any, delivered: ResponseStrengths) -> bool:
    """Add the strengths that were delivered to a response or to an event; whether it has a place.

    That place is each choice. A chunk that opens a chat message has a role and no token yet.
    OpenAI's responses and Anthropic's messages have no choices and get them once, at the end.
    """
    if not isinstance(data, dict):
        return False
    if isinstance(choices := data.get("choices"), list):
        for choice in choices:
            opens = "role" in (choice.get("delta") or ())
            choice[STRENGTHS] = {} if opens else delivered.take(data.get("id", ""), choice["index"])
        return bool(choices)
    if data.get("type") in LAST_EVENTS:
        data = data["response"]
    elif data.get("object") != "response" and data.get("type") not in ("message", "message_delta"):
        return False
    data[STRENGTHS] = delivered.take_all()
    return True


def with_length(headers: Any, length: int) -> list[tuple[bytes, bytes]]:
    """The headers with the length of a body that was rewritten."""
    other_headers = [(name, value) for name, value in headers if name.lower() != b"content-length"]
    return [*other_headers, (b"content-length", str(length).encode())]
