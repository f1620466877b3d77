"""Runs functions in a separate process, and ends process groups."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any


def in_own_process(function: Callable[..., Any], *arguments: object) -> Any:
    """Run ``function`` in a new Python process; returns its result or raises its exception.

    For code that changes its process permanently, such as vLLM plugins, and for peak memory.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def end_group(process: "subprocess.Popen[Any]", patience_s: float) -> None:
    """Terminate a process group leader, then kill the rest of the group, even if the leader has
    ended.
    """
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience_s)
