"""The environment variables that vllm-steer reads or sets."""

import os
from collections.abc import Mapping
from typing import Final

DISABLE: Final = "VLLM_STEER_DISABLE"
ACTIVE: Final = "VLLM_STEER_ACTIVE"
"""The features whose wrappers vLLM's child processes install, separated by commas."""
SELF_TEST: Final = "VLLM_STEER_SELF_TEST"
"""Run the self-test of the sites also where no steer acts inside the layers."""
STEERING: Final = "steering"
STRENGTH_REPORTS: Final = "reports"
"""The feature that reports strengths to the user."""
STREAM_REQUESTS: Final = "streams"
"""The feature of streams of dynamic requests."""
HEADLESS: Final = "headless"
"""Not a feature: the engines of this node have their frontend on another one."""
LOADING: Final = "loading"
"""The feature of steers that are loaded while the engine serves."""
RUNTIME_FOLDER: Final = "VLLM_STEER_RUNTIME_FOLDER"
"""The folder that all API servers of one server share; set by the first of its processes."""
API_KEY: Final = "VLLM_STEER_API_KEY"
"""The key of changes to what is loaded, set by the user."""
RUST_FRONTEND: Final = "VLLM_USE_RUST_FRONTEND"
"""vLLM's own: its server is a Rust program, which runs no Python middleware."""
CPU_CACHE: Final[Mapping[str, str]] = {"VLLM_CPU_KVCACHE_SPACE": "2"}
"""vLLM's own: the KV cache of an engine on a CPU in GiB, where neither the user's environment nor
an option gives a size. vLLM's default, most of the memory, fails as soon as another process has
some.
"""


def is_active(word: str) -> bool:
    """Whether this process installs the wrappers of a feature."""
    return word in os.environ.get(ACTIVE, "").split(",")


def activate(word: str) -> None:
    """Enable a feature's wrappers in this process and its child processes."""
    if not is_active(word):
        os.environ[ACTIVE] = ",".join(filter(None, [os.environ.get(ACTIVE, ""), word]))


def is_disabled() -> bool:
    """Whether the user has disabled the plugin, with any value but ``0`` and ``false``."""
    return _is_set(DISABLE)


def always_self_tests() -> bool:
    """Whether the self-test runs in every engine with a steer config."""
    return _is_set(SELF_TEST)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() not in ("", "0", "false")


def uses_rust_frontend() -> bool:
    """Whether ``vllm serve`` of this environment answers HTTP by its Rust program."""
    return os.environ.get(RUST_FRONTEND, "").strip() not in ("", "0")
