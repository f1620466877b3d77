"""The environment variables that vllm-steer reads, and the one that it sets."""

import os
from typing import Final

DISABLE: Final = "VLLM_STEER_DISABLE"
ACTIVE: Final = "VLLM_STEER_ACTIVE"
"""What the processes that vLLM starts are to patch: features, separated by commas."""


def is_disabled() -> bool:
    """Whether the user has switched the plugin off: by any word but ``0`` and ``false``."""
    return os.environ.get(DISABLE, "").strip().lower() not in ("", "0", "false")
