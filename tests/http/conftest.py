"""Servers and steer configs of the tests over HTTP."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest
from server_process import BASE, Server, random_steers, serving, tail, write_config


@pytest.fixture(scope="module")
def serve_with() -> Callable[[Path, Sequence[str]], AbstractContextManager[str]]:
    """``serving``, for tests that start servers with their own options."""
    return serving


@pytest.fixture(scope="module")
def steer_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A steer config with random steers, next to their files."""
    return write_config(tmp_path_factory.mktemp("steers"), random_steers())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for a module, started with ``--steer-config``."""
    folder = tmp_path_factory.mktemp("server")
    steers = random_steers()
    config = write_config(folder, steers)
    log = folder / "serve.log"
    options = [f"--steer-config={config}", f"--served-model-name={BASE}", "--enable-scale-out"]
    with serving(log, options) as url:
        yield Server(url, steers, log)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Show the end of the server's log with a failed test."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    running = getattr(item, "funcargs", {}).get("server")
    if report.failed and isinstance(running, Server):
        report.sections.append(("vllm serve", tail(running.log)))


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    """A client of the server."""
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client
