"""Functions in a process of their own."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

Found = TypeVar("Found")


def in_own_process(function: Callable[..., Found], *given: object) -> Found:
    """What ``function`` returns or raises in a new Python, which ends with it.

    For what changes its process for good, such as vLLM and its plugins, and for peak memory.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *given).result()
