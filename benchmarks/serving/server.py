"""A `vllm serve` on loopback: started on a free port, awaited, ended."""

import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from serving.vllm_process import VLLM, Child, child, failure

HOST = "127.0.0.1"
START_LIMIT_S = 900.0


@contextmanager
def serving(model: Path, options: Sequence[str], log: Path, *, plugin: bool) -> Iterator[str]:
    """Serve until the block ends; yields the address once the server answers.

    Raises ``ProcessError`` with the end of the log if it stops or is not ready in time.
    """
    port = _free_port()
    url = f"http://{HOST}:{port}"
    arguments = [*VLLM, "serve", str(model), f"--host={HOST}", f"--port={port}", *options]
    with child(arguments, log, plugin=plugin) as process:
        problem = _wait_until_ready(process, f"{url}/health")
        if problem:
            raise failure(arguments, problem, log)
        yield url


def _wait_until_ready(process: Child, url: str) -> str | None:
    """None once ``url`` answers, else what went wrong."""
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return f"ended with code {process.returncode} before it was ready"
        if _answers(url):
            return None
        time.sleep(0.5)
    return f"was not ready after {START_LIMIT_S:.0f} s"


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
