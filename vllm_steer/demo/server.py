"""A ``vllm serve`` process on the loopback interface."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

from vllm_steer import embedded
from vllm_steer.environment import API_KEY, CPU_CACHE
from vllm_steer.errors import SteerError

HOST = "127.0.0.1"
START_LIMIT_S = 150
STOP_LIMIT_S = 15
SERVED_NAME = "embedded"
_OPTIONS = ("--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "256")
_RUNTIME = {
    "enabled": True,
    "room": {"max_rank": 64, "sites": ["resid", "attn_in", "attn_out", "heads"]},
}
_ENVIRONMENT = {
    **CPU_CACHE,
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "passive",
}


@dataclass(frozen=True)
class EmbeddedServer:
    """A running server; ``changes_key`` is the key to load steers with, None if it loads none."""

    address: str
    _process: "subprocess.Popen[bytes]"
    changes_key: str | None = None

    @property
    def api_url(self) -> str:
        """The base URL of an OpenAI client."""
        return f"{self.address}/v1"

    def wait(self) -> NoReturn:
        """Wait until the server ends by itself, which is an error."""
        raise _ServerEndedError(f"vllm serve ended with code {self._process.wait()}")


@contextmanager
def serve_embedded_model(
    on_wait: Callable[[float], None], *, port: int | None = None, loads_steers: bool = False
) -> Iterator[EmbeddedServer]:
    """Serve the embedded model with its steers, and end the process on exit.

    ``on_wait`` receives the seconds waited so far. ``port`` None takes a free one.
    ``loads_steers`` lets the server load steers, with the user's key of changes or a new one.
    Raises ``SteerError`` with the end of the server's log if it ends by itself or is not ready in
    time, and for a port that is taken.
    """
    port = _free_port() if port is None else _checked_port(port)
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(embedded.MODEL)),
        *("--served-model-name", SERVED_NAME, "--host", HOST, "--port", str(port)),
        *("--steer-config", _steer_config(loads_steers), *_OPTIONS),
    ]
    key = (os.environ.get(API_KEY) or secrets.token_urlsafe(12)) if loads_steers else None
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command,
            env={**_ENVIRONMENT, **os.environ, **({API_KEY: key} if key else {})},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait_until_ready(process, f"http://{HOST}:{port}/health", on_wait)
            yield EmbeddedServer(f"http://{HOST}:{port}", process, key)
        except _ServerEndedError as error:
            log.seek(0)
            raise SteerError(f"{error}; the end of its log:\n{log.read()[-3000:]}") from None
        finally:
            _stop(process)


def _steer_config(loads_steers: bool) -> str:
    """The value of ``--steer-config``: the embedded config, or inline with room for steers."""
    if not loads_steers:
        return str(embedded.STEER_CONFIG)
    from vllm_steer.config_text import read_config_file  # imports PyTorch

    config = read_config_file(embedded.STEER_CONFIG, "the embedded steer config")
    folder = embedded.STEER_CONFIG.parent
    steers = {
        name: {**entry, "path": str(folder / entry["path"])}
        for name, entry in config["steers"].items()
    }
    return json.dumps({**config, "steers": steers, "runtime": _RUNTIME})


class _ServerEndedError(Exception):
    """The server ended by itself or did not get ready."""


def _wait_until_ready(
    process: "subprocess.Popen[bytes]", url: str, on_wait: Callable[[float], None]
) -> None:
    started = time.monotonic()
    while (waited := time.monotonic() - started) < START_LIMIT_S:
        if process.poll() is not None:
            raise _ServerEndedError(f"vllm serve ended with code {process.returncode}")
        on_wait(waited)
        if _answers(url):
            return
        time.sleep(0.5)
    raise _ServerEndedError(f"vllm serve was not ready after {START_LIMIT_S} s")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End the server and its child processes, which share its process group."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(STOP_LIMIT_S)


def _checked_port(port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise SteerError(
                f"port {port} cannot be used: {error.strerror}; give another"
            ) from None
    return port


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
