"""``vllm-steer demo --page`` without a server: what it prints, and how it ends."""

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from command_tools import call

from vllm_steer.cli import demo
from vllm_steer.demo.server import HOST
from vllm_steer.errors import SteerError


class Interrupted:
    """A running server that is interrupted as soon as it is waited for."""

    address = "http://127.0.0.1:8123"
    api_url = f"{address}/v1"

    changes_key = "k3y"

    def wait(self) -> None:
        signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def ports(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The ports that servers were asked for; SIGTERM is handled as before afterwards."""
    asked: list[Any] = []

    @contextmanager
    def serve(on_wait: Any, *, port: int | None, loads_steers: bool) -> Iterator[Interrupted]:
        assert loads_steers
        on_wait(0.0)
        asked.append(port)
        yield Interrupted()

    monkeypatch.setattr(demo, "serve_embedded_model", serve)
    before = signal.getsignal(signal.SIGTERM)
    yield asked
    signal.signal(signal.SIGTERM, before)


def test_the_address_of_the_page_is_printed_and_an_interrupt_is_its_usual_end(
    ports: list[Any],
) -> None:
    completed = call("demo", "--page", "--port", "8123")
    assert completed.exit_code == 0
    assert "open http://127.0.0.1:8123/steer in a browser; Ctrl-C stops" in completed.output
    assert "key to load steer files on the page: k3y" in completed.output
    assert "stopped the server" in completed.output
    assert ports == [8123]


def test_without_a_port_a_free_one_is_taken(ports: list[Any]) -> None:
    assert call("demo", "--page").exit_code == 0
    assert ports == [None]


def test_a_port_that_is_taken_is_said_before_a_server_starts() -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        completed = call("demo", "--page", "--port", port)
    assert isinstance(completed.exception, SteerError)
    message = f"port {port} cannot be used: Address already in use; give another"
    assert str(completed.exception) == message
