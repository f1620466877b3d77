"""A `vllm` command as a child process: its environment, its log, and the end of its group.

Each child leads a process group of its own, so that it is ended with all it started and nothing
else is.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

DEFAULTS = {
    "OMP_WAIT_POLICY": "passive",  # a waiting server must not spin on the cores of another
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
DISABLE = "VLLM_STEER_DISABLE"
NOT_INHERITED = ("VLLM_STEER_ACTIVE", DISABLE, "VLLM_ENABLE_V1_MULTIPROCESSING")
VLLM = ("-m", "vllm.entrypoints.cli.main")
RUN_LIMIT_S = 1200.0
STOP_LIMIT_S = 30.0

Child = subprocess.Popen[bytes]


class ProcessError(RuntimeError):
    """A child ended with an error or took too long; the message has the end of its log."""


def environment(*, plugin: bool) -> dict[str, str]:
    """The outer environment with ``DEFAULTS`` where it says nothing, the plugin on or off."""
    outer = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    return DEFAULTS | outer | ({} if plugin else {DISABLE: "1"})


@contextmanager
def child(
    arguments: Sequence[str], log: Path, *, plugin: bool
) -> Iterator[subprocess.Popen[bytes]]:
    """Run this Python with ``arguments``; its group is ended on the way out, in any case."""
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
        _end(process)


def run(arguments: Sequence[str], log: Path, *, plugin: bool) -> None:
    """Run a child to its end. Raises ``ProcessError`` unless it succeeds in time."""
    with child(arguments, log, plugin=plugin) as process:
        try:
            code = process.wait(RUN_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise failure(arguments, f"was not done after {RUN_LIMIT_S:.0f} s", log) from None
    if code != 0:
        raise failure(arguments, f"ended with code {code}", log)


def failure(arguments: Sequence[str], what: str, log: Path, lines: int = 40) -> ProcessError:
    """The error that says what a child did, with the end of its log."""
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    return ProcessError(f"python {' '.join(arguments)}\n{what}; the end of its log:\n{tail}")


def _end(process: Child) -> None:
    """The leader politely; then whatever of its group is left, also when the leader has ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_LIMIT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(STOP_LIMIT_S)
