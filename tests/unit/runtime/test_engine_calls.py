"""A server's calls of its engine cores, some of which die."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_steer.serving.runtime import engines
from vllm_steer.serving.runtime.engines import AsyncEngines


def client_of(*answers: Any, errored: bool = False) -> Any:
    """A client of engines with these answers; one without an answer has died."""

    async def call(method: str, *args: Any, engine: int) -> Any:
        if answers[engine] is None:
            await asyncio.Event().wait()
        if isinstance(answers[engine], Exception):
            raise answers[engine]
        return method, *args, answers[engine]

    core = SimpleNamespace(_call_utility_async=call, core_engines=list(range(len(answers))))
    return SimpleNamespace(engine_core=core, errored=errored)


def called(client: Any) -> Any:
    return asyncio.run(AsyncEngines(client).call("steer_room", 1))


def test_all_engines_answer_in_order() -> None:
    assert called(client_of("a", "b")) == [("steer_room", 1, "a"), ("steer_room", 1, "b")]


def test_a_call_ends_when_an_engine_dies() -> None:
    with pytest.raises(RuntimeError, match="an engine core has died before it answered steer_room"):
        called(client_of("a", None, errored=True))


def test_a_call_of_an_engine_that_never_answers_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "LONGEST_CALL", 0.0)
    with pytest.raises(TimeoutError, match="has not answered steer_room in time"):
        called(client_of("a", None))


def test_an_error_of_an_engine_is_raised() -> None:
    with pytest.raises(ValueError, match="x"):
        called(client_of("a", ValueError("x")))
