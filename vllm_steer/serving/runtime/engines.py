"""How a frontend calls all of its engine cores, and waits."""

import asyncio
import contextvars
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Final, Protocol, TypeVar

from vllm_steer.runtime.background import background_thread
from vllm_steer.serving.runtime.reserved_bank import Reply

T = TypeVar("T")
LONGEST_CALL: Final = 120.0
"""Seconds within which an engine that is alive answers."""
_LOOKS_EVERY: Final = 0.5
"""Seconds after which it is looked whether all engines are alive."""


@cache
def _file_checks() -> ThreadPoolExecutor:
    """The thread of this process that checks steers' files."""
    return background_thread()


class Engines(Protocol):
    """The engine cores of a frontend; what they answer to one call, in one order."""

    async def call(self, method: str, *args: Any) -> Sequence[Reply]: ...
    async def sleep(self, seconds: float) -> None: ...
    async def in_thread(self, function: Callable[..., T], *args: Any) -> T: ...


@dataclass(frozen=True)
class AsyncEngines:
    """Those of an ``AsyncLLM``: one, or all data-parallel ones."""

    engine_client: Any

    async def call(self, method: str, *args: Any) -> Sequence[Reply]:
        client = self.engine_client.engine_core
        calls = [
            client._call_utility_async(method, *args, engine=engine)
            for engine in client.core_engines
        ]
        answers = asyncio.gather(*calls)
        deadline = time.monotonic() + LONGEST_CALL
        try:
            while not answers.done():
                await asyncio.wait([answers], timeout=_LOOKS_EVERY)
                if not answers.done():
                    self._check_alive(method, deadline)
        finally:
            answers.cancel()
        return list(answers.result())

    def _check_alive(self, method: str, deadline: float) -> None:
        """vLLM leaves a call without an answer when the engine that was asked dies."""
        if self.engine_client.errored:
            raise RuntimeError(f"an engine core has died before it answered {method}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"an engine core has not answered {method} in time")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        work = partial(contextvars.copy_context().run, function, *args)
        return await asyncio.get_running_loop().run_in_executor(_file_checks(), work)


@dataclass(frozen=True)
class SyncEngines:
    """The engine core of an ``LLM``, in this process or in one of its own; nothing is awaited."""

    llm: Any

    async def call(self, method: str, *args: Any) -> Sequence[Reply]:
        client = self.llm.llm_engine.engine_core
        if hasattr(client, "call_utility"):
            return [client.call_utility(method, *args)]
        reply: Reply = getattr(client.engine_core, method)(*args)
        return [reply]

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        return function(*args)
