"""Threads that read and check steers' files, and leave the processors to the steps of the model."""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Final

NICENESS: Final = 10
"""What is added to a thread's niceness: a step that needs the processor gets nine tenths of it."""


def background_thread() -> ThreadPoolExecutor:
    """One thread of low priority, where the system has priorities of single threads (Linux)."""
    return ThreadPoolExecutor(1, "vllm-steer-background", initializer=_lower_priority)


def _lower_priority() -> None:
    if sys.platform == "linux":
        thread = threading.get_native_id()
        now = os.getpriority(os.PRIO_PROCESS, thread)
        os.setpriority(os.PRIO_PROCESS, thread, now + NICENESS)
