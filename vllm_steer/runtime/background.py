"""Threads that read and check steers' files, and leave the processors to the steps of the model.

They have a low priority, and rest after each piece of work: a file takes some more time, and each
of the steps beside it has a smaller part of the work to bear.
"""

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final

NICENESS: Final = 10
"""What is added to a thread's niceness: a step that needs the processor gets nine tenths of it."""
REST: Final = 4.0
"""How long a thread rests after a piece of work, in units of the time that it took."""

_own = threading.local()


def background_thread(*, low_priority: bool = True) -> ThreadPoolExecutor:
    """One thread, of low priority where the system has priorities of single threads (Linux).

    A thread that shares Python's lock with the steps of the model is better off without: it would
    keep the lock while it waits for a processor.
    """
    return ThreadPoolExecutor(
        1, "vllm-steer-background", initializer=_begin, initargs=(low_priority,)
    )


def rest() -> None:
    """Between two pieces of work: let others go on. In another thread than these it does nothing.

    Called where some milliseconds of work are done and nothing is locked.
    """
    worked_until = getattr(_own, "worked_until", None)
    if worked_until is None:
        return
    time.sleep(REST * (time.thread_time() - worked_until))
    _own.worked_until = time.thread_time()


def _begin(low_priority: bool) -> None:
    _own.worked_until = time.thread_time()
    if low_priority and sys.platform == "linux":
        thread = threading.get_native_id()
        now = os.getpriority(os.PRIO_PROCESS, thread)
        os.setpriority(os.PRIO_PROCESS, thread, now + NICENESS)
