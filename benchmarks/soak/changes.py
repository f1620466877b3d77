"""Loads, replacements and unloads while requests run, and what each name meant when."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp

from benchmarks.soak.contents import KEY, Content

NAMES: Final = ("one", "two", "three", "four")
HEADERS: Final = {"Authorization": f"Bearer {KEY}"}
NO_ROOM: Final = "all of the room is in use"


@dataclass
class History:
    """By name: the times when its content began to change and had changed, and the new content."""

    changes: dict[str, list[tuple[float, float, str | None]]] = field(
        default_factory=lambda: {name: [(0.0, 0.0, None)] for name in NAMES}
    )

    def now(self, name: str) -> str | None:
        """The content of a name after its last change."""
        return self.changes[name][-1][2]

    def possible(self, name: str, begin: float, end: float) -> set[str | None]:
        """The contents that a name may have had at any time of a span."""
        changes = self.changes[name]
        ends = [start_and_end[1] for start_and_end in changes[1:]] + [float("inf")]
        return {
            content
            for (start, _, content), over in zip(changes, ends, strict=True)
            if start <= end and over >= begin
        }


async def post(
    session: aiohttp.ClientSession, route: str, body: Mapping[str, Any]
) -> tuple[int, Any]:
    """Ask for a change; its status and answer."""
    async with session.post(f"/v1/{route}", json=body, headers=HEADERS) as reply:
        return reply.status, await reply.json()


@dataclass
class Changes:
    """Loads, replaces and unloads steers until the run ends; ``faults`` has the wrong answers."""

    session: aiohttp.ClientSession
    contents: Sequence[Content]
    rng: random.Random
    history: History = field(default_factory=History)
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    async def run(self, is_due: Callable[[], bool], is_over: Callable[[], bool]) -> None:
        """Load every name, then make one change whenever one is due."""
        for name, content in zip(NAMES, self.contents, strict=False):
            body = {"steer_name": name, "steer_path": str(content.path)}
            await self._do("load_steer", body, name, content.name, 200)
        while not is_over():
            if self.contents and is_due():
                await self._change()
            else:
                await asyncio.sleep(0.005)

    async def _change(self) -> None:
        name, content = self.rng.choice(NAMES), self.rng.choice(self.contents)
        before = self.history.now(name)
        what = self.rng.choices(("load", "replace", "unload", "damaged"), (3, 5, 1, 1))[0]
        if what == "unload":
            expected = 404 if before is None else 200
            await self._do("unload_steer", {"steer_name": name}, name, None, expected)
            return
        source = {"steer_path": str(content.path)}
        if self.rng.random() < 0.5:
            source = {"steer_data": content.data}
        if what == "damaged":
            source = {"steer_data": content.data[: len(content.data) // 8 * 4]}
        body = {"steer_name": name, **source, "load_inplace": what != "load"}
        expected = 409 if what == "load" and before is not None else 200
        expected = 422 if what == "damaged" else expected
        await self._do("load_steer", body, name, content.name, expected)

    async def _do(
        self, route: str, body: Mapping[str, Any], name: str, content: str | None, expected: int
    ) -> None:
        changes, begin = self.history.changes[name], time.monotonic()
        may_change = expected == 200
        if may_change:
            changes.append((begin, float("inf"), content))
        status, answer = await post(self.session, route, body)
        self.counts[f"{route} {status}"] += 1
        if may_change and status == 200:
            changes[-1] = (begin, time.monotonic(), content)
        elif may_change:
            changes.pop()
        is_full = status == 409 and NO_ROOM in str(answer)
        if status != expected and not (may_change and is_full):
            self.faults.append(f"{route} of {name}: {status}, expected {expected}: {answer}")
