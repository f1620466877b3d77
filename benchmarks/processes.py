"""Functions in a process of their own, and the end of processes with all that they started."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any


def in_own_process(function: Callable[..., Any], *arguments: object) -> Any:
    """What ``function`` returns or raises in a new Python, which ends with it.

    For what changes its process for good, such as vLLM and its plugins, and for peak memory.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def end_group(process: "subprocess.Popen[Any]", patience_s: float) -> None:
    """End a process that leads its group, politely; then whatever of the group is left, also when
    the leader has ended.
    """
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience_s)
