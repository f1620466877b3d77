"""`vllm` commands as child processes: environment, log, and end of the process group.

Each child leads its own process group, so that it ends with all its child processes and nothing
else.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.processes import end_group

DEFAULTS = {
    "OMP_WAIT_POLICY": "passive",  # an idle server must not busy-wait on the cores of another
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
DISABLE = "VLLM_STEER_DISABLE"
NOT_INHERITED = ("VLLM_STEER_ACTIVE", DISABLE, "VLLM_ENABLE_V1_MULTIPROCESSING")
VLLM = ("-m", "vllm.entrypoints.cli.main")
HOST = "127.0.0.1"
START_LIMIT_S = 900.0
RUN_LIMIT_S = 1200.0
STOP_LIMIT_S = 30.0

Child = subprocess.Popen[bytes]


def environment(*, plugin: bool) -> dict[str, str]:
    """The outer environment, with ``DEFAULTS`` for missing variables and the plugin on or off."""
    outer = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    return DEFAULTS | outer | ({} if plugin else {DISABLE: "1"})


@contextmanager
def child(arguments: Sequence[str], log: Path, *, plugin: bool) -> Iterator[Child]:
    """Run this Python with ``arguments``; its process group always ends with the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(plugin=plugin),
            start_new_session=True,
        )
    try:
        yield process
    finally:
        end_group(process, STOP_LIMIT_S)


def run(arguments: Sequence[str], log: Path, *, plugin: bool) -> None:
    """Run a child to its end; it must succeed in time."""
    with child(arguments, log, plugin=plugin) as process:
        _expect(process.wait(RUN_LIMIT_S) == 0, process, log)


@contextmanager
def serving(model: Path, options: Sequence[str], log: Path, *, plugin: bool) -> Iterator[str]:
    """Run `vllm serve` on loopback until the block ends; yields the address when the server is
    ready.
    """
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    url = f"http://{HOST}:{port}"
    arguments = [*VLLM, "serve", str(model), f"--host={HOST}", f"--port={port}", *options]
    with child(arguments, log, plugin=plugin) as process:
        deadline = time.monotonic() + START_LIMIT_S
        while not _answers(f"{url}/health"):
            _expect(process.poll() is None and time.monotonic() < deadline, process, log)
            time.sleep(0.5)
        yield url


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _expect(well: bool, process: Child, log: Path) -> None:
    """Raise an error with the end of the log unless the child succeeded."""
    if not well:
        state = "is not ready" if process.returncode is None else f"ended: {process.returncode}"
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
        raise RuntimeError(f"{process.args} {state}; the end of its log:\n{tail}")
