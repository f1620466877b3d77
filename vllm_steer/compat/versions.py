"""The vLLM versions that vllm-steer supports, and the installed one."""

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from packaging.version import InvalidVersion, Version

OLDEST: Final = Version("0.25.1")
NEWEST: Final = Version("0.33")
SUPPORTED: Final = f"{OLDEST} to {NEWEST}"


def is_supported(version: str) -> bool:
    """Whether this vLLM version is supported. Which were run: ``docs/compatibility.md``."""
    try:
        parsed = Version(version)
    except InvalidVersion:
        return False
    return parsed >= OLDEST and (parsed.major, parsed.minor) <= (NEWEST.major, NEWEST.minor)


def installed_version() -> str:
    """The version of the installed vLLM, as it says itself; ``unknown`` without one."""
    reported = getattr(sys.modules.get("vllm"), "__version__", None)
    if isinstance(reported, str):
        return reported
    try:
        return version("vllm")
    except PackageNotFoundError:
        return "unknown"
