"""The environment variables that vllm-steer reads or sets."""

import os
from typing import Final

DISABLE: Final = "VLLM_STEER_DISABLE"
ACTIVE: Final = "VLLM_STEER_ACTIVE"
"""What the processes that vLLM starts are to wrap, words separated by commas."""
STEERING: Final = "steering"
REPORTS: Final = "reports"
"""The way of strengths to the user, which every request may ask for."""
STREAMS: Final = "streams"
"""The streams of dynamic requests."""


def is_active(word: str) -> bool:
    """Whether this process installs the wrappers of a feature."""
    return word in os.environ.get(ACTIVE, "").split(",")


def activate(word: str) -> None:
    """Enable a feature's wrappers in this process and its child processes."""
    if not is_active(word):
        os.environ[ACTIVE] = ",".join(filter(None, [os.environ.get(ACTIVE, ""), word]))


def is_disabled() -> bool:
    """Whether the user has disabled the plugin, with any value but ``0`` and ``false``."""
    return os.environ.get(DISABLE, "").strip().lower() not in ("", "0", "false")
