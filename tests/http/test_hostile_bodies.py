"""Invalid bodies sent to a steered server with an API key and to an unsteered one.

Each kind gets its expected answer, and none gets a server error; meanwhile streams run to their
end, no kind delays ``/health``, and the memory does not grow.
"""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from hostile_bodies import BASE, DENIED, REFUSED, SAME, SERVED, Kind, kinds

pytestmark = [pytest.mark.matrix, pytest.mark.timeout(1500)]

KEY = "sk-hostile"
RIGHT = {"authorization": f"Bearer {KEY}"}
LIMIT_MS = 50.0
PAUSES_S = (0, 0, 1, 2, 4, 8, 16, 32)
"""Before a kind is sent again because ``/health`` took longer than the limit beside it: whatever
else the machine does has its time to pass.
"""
GROWTH_MIB = 64
ZEROS_MIB = 300
LARGE = 100_000


@dataclass
class Answers:
    """Statuses by kind, and the bodies of the steered server's errors."""

    steered: dict[str, int] = field(default_factory=dict)
    unsteered: dict[str, int] = field(default_factory=dict)
    errors: dict[str, Any] = field(default_factory=dict)
    health: dict[str, dict[str, float]] = field(default_factory=dict)
    """By server and kind: ``/health``'s longest time beside it in ms, the least of all rounds."""
    memory: dict[str, float] = field(default_factory=dict)
    streams: list[str] = field(default_factory=list)
    log: str = ""


def request(client: httpx.Client, kind: Kind) -> httpx.Response:
    headers = {}
    if kind.content_type is not None:
        headers["content-type"] = kind.content_type
    if kind.key is not None:
        headers["authorization"] = RIGHT["authorization"] if kind.key == "right" else kind.key
    return client.request(kind.method, kind.path, content=kind.body, headers=headers)


def process_of(url: str) -> int:
    """The server process that was started for an address, found by its port."""
    port = f"--port={urlsplit(url).port}"
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command_line = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if port in command_line:
            return int(folder.name)
    raise AssertionError(f"no process with {port}")


def mebibytes(pid: int, field: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise AssertionError(field)


Spans = list[tuple[float, float]]
"""Begin and end, of the monotonic clock."""


@contextmanager
def polled(url: str, polls: Spans) -> Iterator[None]:
    """Poll ``/health`` from another process meanwhile."""
    script = Path(__file__).with_name("health_poll.py")
    command = [sys.executable, str(script), url]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        yield
        output, _ = process.communicate("end\n", timeout=120)
        assert process.returncode == 0
        polls += map(tuple, json.loads(output))


@contextmanager
def timed(spans: dict[str, tuple[float, float]], kind: Kind) -> Iterator[None]:
    begin = time.monotonic()
    yield
    spans[kind.name] = (begin, time.monotonic())


def longest_beside(polls: Spans, span: tuple[float, float]) -> float:
    """The longest poll, in ms, of those that overlap a span."""
    begin, end = span
    return max((1000 * (b - a) for a, b in polls if a < end and b > begin), default=0.0)


def round_of(url: str, client: httpx.Client, kinds: Iterable[Kind]) -> dict[str, float]:
    """The longest ``/health`` poll during each kind."""
    polls: Spans = []
    spans: dict[str, tuple[float, float]] = {}
    with polled(url, polls):
        for kind in kinds:
            with timed(spans, kind):
                request(client, kind)
    return {name: longest_beside(polls, span) for name, span in spans.items()}


@contextmanager
def streaming(url: str, streams: list[str]) -> Iterator[None]:
    """Context that keeps one stream running and records the last line of each."""
    over = threading.Event()
    body = {**BASE, "max_tokens": 100, "ignore_eos": True, "stream": True, "steer": "a:1"}

    def stream() -> None:
        with httpx.Client(base_url=url, headers=RIGHT, timeout=120) as client:
            while not over.is_set():
                with client.stream("POST", "/v1/completions", json=body) as reply:
                    lines = [line for line in reply.iter_lines() if line]
                streams.append(lines[-1])
                over.wait(1)

    thread = threading.Thread(target=stream)
    thread.start()
    yield
    over.set()
    thread.join()


def send_zeros_without_key(url: str) -> bytes:
    """The head of the response to a body of zeros, sent as far as the server accepts it."""
    address = urlsplit(url)
    zeros = bytes(1 << 20)
    with socket.create_connection((address.hostname or "", address.port or 0), 60) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % (ZEROS_MIB << 20)
        )
        with suppress(OSError):  # a server that has answered may hang up
            for _ in range(ZEROS_MIB):
                connection.sendall(zeros)
        return connection.recv(1000)


def send_cut_bodies(url: str) -> None:
    """Chunked and plain bodies whose client leaves in the middle."""
    address = urlsplit(url)
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Authorization: " + RIGHT["authorization"].encode() + b"\r\n"
    )
    bodies = (
        b'Transfer-Encoding: chunked\r\n\r\n10\r\n{"steer": "a:1",\r\n',
        b'Transfer-Encoding: chunked\r\n\r\n10\r\n{"steer": "a:1"',
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n",
        b'Content-Length: 500\r\n\r\n{"steer": ',
        b"Content-Length: 9000000\r\n\r\n" + b"a:1," * 100_000,
    )
    for body in bodies * 5:
        with socket.create_connection(
            (address.hostname or "", address.port or 0), 60
        ) as connection:
            connection.sendall(head + body)


@pytest.fixture(scope="module")
def answers(
    tmp_path_factory: pytest.TempPathFactory, serve_with: Any, steer_config: Path
) -> Answers:
    """Send all kinds to both servers once; returns the statuses and measurements."""
    folder = tmp_path_factory.mktemp("hostile")
    options = ["--served-model-name=base", f"--api-key={KEY}"]
    statuses = Answers()
    polls: Spans = []
    spans: dict[str, tuple[float, float]] = {}
    logs = {name: folder / f"{name}.log" for name in ("steered", "unsteered")}
    with ExitStack() as stack:
        steered = stack.enter_context(
            serve_with(logs["steered"], [*options, f"--steer-config={steer_config}"])
        )
        unsteered = stack.enter_context(serve_with(logs["unsteered"], options))
        pid = process_of(steered)
        clients = [
            stack.enter_context(httpx.Client(base_url=url, timeout=120))
            for url in (steered, unsteered)
        ]
        all_kinds = kinds()
        for kind in all_kinds[::7]:  # warms up
            for client in clients:
                request(client, kind)
        statuses.memory["before"] = mebibytes(pid, "VmRSS")
        with polled(steered, polls), streaming(steered, statuses.streams):
            for kind in all_kinds:
                with timed(spans, kind):
                    reply = request(clients[0], kind)
                statuses.steered[kind.name] = reply.status_code
                if kind.due == REFUSED and reply.status_code == 400:
                    statuses.errors[kind.name] = reply.json()
                if kind.due == SAME or len(kind.body) > LARGE:  # others would only cost time
                    statuses.unsteered[kind.name] = request(clients[1], kind).status_code
        health = {name: longest_beside(polls, span) for name, span in spans.items()}
        statuses.health = {"steered": health, "unsteered": {}}
        urls = {"steered": steered, "unsteered": unsteered}
        for pause in PAUSES_S:
            again = [kind for kind in all_kinds if health[kind.name] > LIMIT_MS]
            if not again:
                break
            time.sleep(pause)
            for (server, url), client in zip(urls.items(), clients, strict=True):
                least = statuses.health[server]
                for name, longest in round_of(url, client, again).items():
                    least[name] = min(longest, least.get(name, longest))
        statuses.memory["after"] = mebibytes(pid, "VmRSS")
        peak = mebibytes(pid, "VmHWM")
        statuses.memory["zeros"] = float(b" 401 " in send_zeros_without_key(steered))
        statuses.memory["peak-by-zeros"] = mebibytes(pid, "VmHWM") - peak
        statuses.memory["after-zeros"] = mebibytes(pid, "VmRSS")
        send_cut_bodies(steered)
        reply = httpx.post(f"{steered}/v1/completions", json=BASE, headers=RIGHT, timeout=60)
        statuses.steered["after all"] = reply.status_code
        statuses.log = logs["steered"].read_text(errors="replace")
    return statuses


def by_due(due: str) -> list[Kind]:
    return [kind for kind in kinds() if kind.due == due]


def test_the_corpus_has_enough_kinds() -> None:
    assert len(kinds()) >= 700


def test_no_body_is_answered_with_a_server_error(answers: Answers) -> None:
    """Where the unsteered server answers with one, for reasons of its own, the body is vLLM's."""
    errors = {name: status for name, status in answers.steered.items() if status >= 500}
    assert {n: s for n, s in errors.items() if answers.unsteered.get(n) != s} == {}


@pytest.mark.parametrize(
    ("due", "status"), [(REFUSED, 400), (DENIED, 401), (SERVED, 200)], ids=[REFUSED, DENIED, SERVED]
)
def test_every_kind_gets_the_expected_status(answers: Answers, due: str, status: int) -> None:
    statuses = {kind.name: answers.steered[kind.name] for kind in by_due(due)}
    assert {name: code for name, code in statuses.items() if code != status} == {}


def test_bodies_without_a_steer_get_the_status_of_the_unsteered_server(answers: Answers) -> None:
    unlike = {
        kind.name: (answers.steered[kind.name], answers.unsteered[kind.name])
        for kind in by_due(SAME)
        if answers.steered[kind.name] != answers.unsteered[kind.name]
    }
    assert unlike == {}


def test_every_refusal_is_short_and_names_a_field(answers: Answers) -> None:
    for name, body in answers.errors.items():
        message = body["error"]["message"]
        assert 0 < len(message) <= 1000, name
        assert message.isprintable(), name
        assert body["error"]["type"] == "BadRequestError", name
        assert (body.get("type") == "error") != ("param" in body["error"]), name


def test_concurrent_streams_ran_to_their_end(answers: Answers) -> None:
    assert answers.streams
    assert set(answers.streams) == {"data: [DONE]"}
    assert answers.steered["after all"] == 200
    assert "Traceback" not in answers.log


def test_no_kind_delays_the_health_route(answers: Answers) -> None:
    """Other work of the machine may delay it at any time; a body would delay it each time.

    If the unsteered server is delayed each time too, vLLM's own parsing of the body is the cause.
    """
    longest_of_all = max(answers.health["steered"].values())
    assert longest_of_all > 0
    waits = {
        name: (longest, answers.health["unsteered"][name])
        for name, longest in answers.health["steered"].items()
        if longest > LIMIT_MS
    }
    print(f"/health beside a kind: at most {longest_of_all:.1f} ms; {waits}")
    assert {n: times for n, times in waits.items() if times[0] > times[1] + LIMIT_MS} == {}


def test_the_memory_does_not_grow_and_bodies_without_the_api_key_are_not_read(
    answers: Answers,
) -> None:
    print(answers.memory)
    assert answers.memory["after"] - answers.memory["before"] < GROWTH_MIB
    assert answers.memory["zeros"] == 1.0
    assert answers.memory["peak-by-zeros"] < GROWTH_MIB
    assert answers.memory["after-zeros"] - answers.memory["before"] < GROWTH_MIB
