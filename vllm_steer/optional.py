"""Optional packages for fitting and evaluation: the extra ``eval``."""

from importlib import import_module
from typing import Any

from vllm_steer.errors import SteerError


def require_package(module: str) -> Any:
    """Import a module of an optional package. Raises ``SteerError`` with the install command."""
    try:
        return import_module(module)
    except ImportError as error:
        raise SteerError(
            f"the package {module.partition('.')[0]} is needed and not installed; "
            'pip install "vllm-steer[eval]"'
        ) from error
