"""Clients that ask side by side; some leave early, some without a word."""

import asyncio
import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp

from benchmarks.soak.cases import NAME, Case, body_of
from benchmarks.soak.changes import NAMES, NO_ROOM, History
from benchmarks.soak.contents import Content

OWN: Final = "mine"
"""The name of a steer that a request brings."""
MODEL: Final = "base"
WAYS: Final = {
    "whole": 50,
    "streamed": 36,
    "closed mid-stream": 5,
    "reset mid-stream": 5,
    "left before the answer": 4,
}
"""How a client asks, and how often."""
SOURCES: Final = ("config", "loaded", "file", "new file")
GONE: Final = ("is unknown", "was unloaded while the request was on its way")


@dataclass(frozen=True)
class Alone:
    """What a case answers alone, and the digest of each of its steers' contents."""

    text: str
    header: str


@dataclass(frozen=True)
class Ask:
    """One request to send: a case, by way of a loaded name, a file of its own, or neither."""

    number: int
    case: Case
    way: str
    source: str
    """``config``, ``loaded``, ``file`` or ``new file``."""
    name: str | None = None


@dataclass
class Answer:
    """What came back; ``text`` is None where the client left before."""

    status: int
    header: str
    text: str
    is_whole: bool
    error: str = ""


def make_asks(count: int, cases: Sequence[Case], seed: int) -> list[Ask]:
    """``count`` requests by chance, all from one seed."""
    rng = random.Random(seed)
    configured = [case for case in cases if case.content is None]
    loaded = [case for case in cases if case.content is not None]
    shares = (50, 30, 10, 10) if loaded else (1, 0, 0, 0)
    asks = []
    for number in range(count):
        way = rng.choices(list(WAYS), list(WAYS.values()))[0]
        source = rng.choices(SOURCES, shares)[0]
        case = rng.choice(configured if source == "config" else loaded)
        names = {"config": None, "loaded": rng.choice(NAMES)}
        asks.append(Ask(number, case, way, source, names.get(source, OWN)))
    return asks


@dataclass
class Clients:
    """Send requests and compare each answer with that of the same request alone."""

    session: aiohttp.ClientSession
    contents: Mapping[str, Content]
    alone: Mapping[tuple[int, str, str | None], Alone]
    contents_of: Mapping[str, str]
    """By the first 12 digits of a digest, the content that has it."""
    history: History
    max_tokens: int
    counts: Counter[str] = field(default_factory=Counter)
    by_source: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    done: int = 0

    async def work(self, asks: "list[Ask]") -> None:
        """Take the next request until there is none."""
        while asks:
            ask = asks.pop()
            begin = time.monotonic()
            try:
                answer = await self._send(ask)
                outcome = self._judge(ask, answer, begin, time.monotonic())
            except (TimeoutError, aiohttp.ClientError, OSError) as error:
                outcome = f"fault: {type(error).__name__} {error}"
            if outcome.startswith("fault"):
                self.faults.append(f"request {ask.number} ({ask.source}, {ask.way}): {outcome}")
                outcome = "fault"
            self.counts[f"{ask.way}: {outcome}"] += 1
            self.by_source[f"{ask.source}: {outcome}"] += 1
            self.done += 1

    async def _send(self, ask: Ask) -> Answer | None:
        body = body_of(self._named(ask), MODEL, self.max_tokens)
        if ask.source in ("file", "new file"):
            file: dict[str, Any] = {"steer_data": self.contents[ask.case.content or ""].data}
            if ask.source == "new file":  # another steer for the server, the same for this request
                file["default_strength"] = 1 + (1 + ask.number) / (1 << 20)
            body["steer_files"] = {OWN: file}
        if ask.way == "left before the answer":
            try:
                async with asyncio.timeout(0.001 * (ask.number % 40)):
                    return await self._whole(body)
            except TimeoutError:
                return None
        if ask.way == "whole":
            return await self._whole(body)
        leaves_after = {"closed mid-stream": 2, "reset mid-stream": 2}.get(ask.way)
        return await self._streamed(body, leaves_after, reset=ask.way == "reset mid-stream")

    def _named(self, ask: Ask) -> Case:
        if ask.name is None:
            return ask.case
        return Case(ask.case.prompt, ask.case.setting.of(ask.name), ask.case.content)

    async def _whole(self, body: Mapping[str, Any]) -> Answer:
        async with self.session.post("/v1/completions", json=body) as reply:
            data = await reply.json()
            header = reply.headers.get("X-Steer", "")
            if reply.status != 200:
                return Answer(reply.status, header, "", True, str(data["error"]["message"]))
            return Answer(200, header, data["choices"][0]["text"], True)

    async def _streamed(
        self, body: Mapping[str, Any], leaves_after: int | None, *, reset: bool
    ) -> Answer:
        text, events, is_whole = "", 0, False
        async with self.session.post("/v1/completions", json={**body, "stream": True}) as reply:
            header = reply.headers.get("X-Steer", "")
            if reply.status != 200:
                message = (await reply.json())["error"]["message"]
                return Answer(reply.status, header, "", True, str(message))
            async for line in reply.content:
                is_whole = is_whole or line.startswith(b"data: [DONE]")
                if line.startswith(b"data: {"):
                    text += "".join(c["text"] for c in json.loads(line[6:])["choices"])
                    events += 1
                if events == leaves_after:
                    _leave(reply, reset=reset)
                    break
        return Answer(200, header, text, is_whole)

    def _judge(self, ask: Ask, answer: Answer | None, begin: float, end: float) -> str:
        if answer is None:
            return "left"
        content = ask.case.content
        possible: set[str | None] = {content}
        if ask.source == "loaded":
            assert ask.name is not None
            possible = self.history.possible(ask.name, begin, end)
        if answer.status != 200:
            return self._judge_refusal(ask, answer, possible)
        if ask.source != "config":
            content = self._content_of(answer.header, ask.name or "")
            if content not in possible:
                return f"fault: served by {content}, which was none of {possible}"
        alone = self.alone.get((ask.case.prompt, ask.case.setting.name, content))
        if alone is None:
            return "not compared: near tie"
        if answer.header != alone.header.replace(f"{NAME}:", f"{ask.name}:"):
            return f"fault: X-Steer is {answer.header}, alone {alone.header}"
        if answer.text != alone.text and (
            answer.is_whole or not alone.text.startswith(answer.text)
        ):
            return f"fault: {answer.text!r}, alone {alone.text!r}, {answer.header}"
        return "equal" if answer.is_whole else "left, equal so far"

    def _judge_refusal(self, ask: Ask, answer: Answer, possible: set[str | None]) -> str:
        if answer.header != "none":
            return f"fault: {answer.status} with X-Steer {answer.header}"
        if ask.source == "loaded" and answer.status == 400:
            if any(text in answer.error for text in GONE) and None in possible:
                return "refused: not loaded"
        elif ask.source != "config" and answer.status == 409 and NO_ROOM in answer.error:
            return "refused: no room"
        return f"fault: {answer.status} {answer.error}"

    def _content_of(self, header: str, name: str) -> str | None:
        """The content that a header names for a steer."""
        for part in header.split(","):
            if part.startswith(f"{name}:"):
                return self.contents_of.get(part.partition("@")[2])
        return None


def _leave(reply: aiohttp.ClientResponse, *, reset: bool) -> None:
    """Close the connection; with ``reset`` as a process does that was killed."""
    connection = reply.connection
    if reset and connection is not None and connection.transport is not None:
        plain = connection.transport.get_extra_info("socket")
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.transport.abort()
    reply.close()
