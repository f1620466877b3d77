"""The environment variables that vllm-steer reads, and the one that it sets."""

import os
from typing import Final

DISABLE: Final = "VLLM_STEER_DISABLE"
ACTIVE: Final = "VLLM_STEER_ACTIVE"
"""Comma-separated features that the processes of vLLM wrap; set by the plugin."""
STEERING: Final = "steering"
REPORTS: Final = "reports"
"""Strengths in outputs."""
STREAMS: Final = "streams"
"""The streams of dynamic requests."""


def is_active(word: str) -> bool:
    """Whether this process is to wrap what the word stands for."""
    return word in os.environ.get(ACTIVE, "").split(",")


def activate(word: str) -> None:
    """Have this process and those started from it wrap what the word stands for."""
    if not is_active(word):
        os.environ[ACTIVE] = ",".join(filter(None, [os.environ.get(ACTIVE, ""), word]))


def is_disabled() -> bool:
    """Whether the user has switched the plugin off: by any word but ``0`` and ``false``."""
    return os.environ.get(DISABLE, "").strip().lower() not in ("", "0", "false")
