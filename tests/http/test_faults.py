"""Processes of a server that are killed, and a state folder that was damaged meanwhile."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from loading_servers import (
    BODY,
    KEY,
    SMALL,
    ask,
    load,
    named_in,
    text_and_header,
    write_runtime_config,
    write_steers,
)
from server_process import serving_process, started, tail

from benchmarks.soak.checks import processes
from vllm_steer.environment import API_KEY
from vllm_steer.runtime.registry import FILE

pytestmark = [pytest.mark.matrix, pytest.mark.timeout(900)]

CLIENT_LIMIT_S, SERVER_LIMIT_S, START_LIMIT_S = 60.0, 90.0, 240.0
STREAMS, WHOLE = 4, 2
VICTIMS = {
    "engine-core": ("VLLM::EngineCore", ()),
    "worker": (
        "VLLM::Worker",
        ("--tensor-parallel-size=2", "--distributed-executor-backend=mp"),
    ),
    "api-server": ("VLLM::APIServer_1", ("--api-server-count=2",)),
}


@pytest.fixture(scope="module", autouse=True)
def key() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(API_KEY, KEY)
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def stream(url: str, begun: threading.Event) -> str:
    """How a stream of many tokens ended."""
    body = {**BODY, "max_tokens": 240, "stream": True, "steer": "v:1"}
    events, last = 0, ""
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=CLIENT_LIMIT_S) as reply:
        for line in reply.iter_lines():
            if line:
                events, last = events + 1, line
            if events == 2:
                begun.set()
    if last == "data: [DONE]":
        return "whole" if events > 240 else "error and end"
    return f"{reply.status_code} ended after {events}"


def whole(url: str) -> str:
    reply = ask(url, "v:1", max_tokens=240)
    return "whole" if reply.status_code == 200 else f"{reply.status_code}"


def load_often(url: str, path: Path, begun: threading.Event) -> str:
    """Replace a steer until that fails."""
    for _ in range(10_000):
        reply = load(url, "other", path, CLIENT_LIMIT_S, load_inplace=True)
        begun.set()
        if reply.status_code != 200:
            return f"{reply.status_code}"
    return "whole"


def outcome(call: object, *args: object) -> str:
    try:
        return str(call(*args))  # type: ignore[operator]
    except httpx.TimeoutException as error:
        return f"hangs: {type(error).__name__}"
    except httpx.TransportError as error:
        return f"closed: {type(error).__name__}"


def kill(process: subprocess.Popen[bytes], name: str) -> None:
    """Kill -9 the last process of a session with this name."""
    pids = [pid for pid, title in processes(process.pid).items() if title.startswith(name)]
    assert pids, processes(process.pid)
    os.kill(max(pids), signal.SIGKILL)


def assert_ends_or_says_so(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """The server ends, or answers with errors of its own."""
    deadline = time.monotonic() + SERVER_LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=5).status_code >= 500:
                return
        time.sleep(0.5)
    assert process.poll() is not None, tail(log)


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_killed_process_ends_requests_with_an_error_and_leaves_a_whole_state(
    victim: str, tmp_path: Path
) -> None:
    name, options = VICTIMS[victim]
    config, steers = write_runtime_config(tmp_path), write_steers(tmp_path)
    options = (*SMALL, f"--steer-config={config}", *options)
    log, begun = tmp_path / "serve.log", [threading.Event() for _ in range(STREAMS + 1)]
    with serving_process(log, options) as (process, url), ThreadPoolExecutor(16) as pool:
        assert load(url, "v", steers["v0"]).status_code == 200
        assert load(url, "l", steers["l0"]).status_code == 200
        before = [text_and_header(ask(url, steer)) for steer in ("v:2", "l:3")]
        futures = [pool.submit(outcome, stream, url, event) for event in begun[1:]]
        futures += [pool.submit(outcome, whole, url) for _ in range(WHOLE)]
        futures += [pool.submit(outcome, load_often, url, steers["v1"], begun[0])]
        for event in begun:
            event.wait(CLIENT_LIMIT_S)
        kill(process, name)
        killed = time.monotonic()
        outcomes = [future.result(CLIENT_LIMIT_S + 30) for future in futures]
        seconds = time.monotonic() - killed
        assert_ends_or_says_so(process, url, log)
    print(f"{victim}: {outcomes} within {seconds:.1f} s")
    assert not [one for one in outcomes if one.startswith("hangs")], outcomes
    named = named_in(tmp_path / "state")
    assert {"l", "v"} <= named.keys() <= {"l", "v", "other"}
    if victim == "engine-core":
        _restart(tmp_path, options, before, set(named))


def _restart(
    folder: Path, options: tuple[str, ...], before: list[tuple[str, str]], names: set[str]
) -> None:
    """All is there again, and nothing else; a damaged file stops the next start."""
    state = folder / "state"
    with serving_process(folder / "again.log", options) as (_, url):
        after = [text_and_header(ask(url, steer)) for steer in ("v:2", "l:3")]
        unknown = ask(url, "no:1")
        for name in names:
            assert name in unknown.json()["error"]["message"]
    assert after == before
    named = named_in(state)
    files = {path.name for path in state.iterdir()} - {"lock"}
    assert files == {FILE, *(path.name for path in named.values())}
    os.truncate(named["v"], 100)
    with started(log := folder / "damaged.log", options) as (process, _):
        assert process.wait(START_LIMIT_S) != 0
    text = " ".join(tail(log, 400).split())
    assert "steer v, loaded before the restart, cannot be loaded again" in text
    assert f"remove it from {state / FILE}" in text
