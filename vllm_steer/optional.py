"""Packages that only fitting and evaluation need: the extra ``eval``."""

from importlib import import_module
from typing import Any

from vllm_steer.errors import SteerError


def require_package(module: str) -> Any:
    """A module of an optional package; ``SteerError`` says how to get it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise SteerError(
            f"{module.partition('.')[0]} is not installed and this needs it; "
            'pip install "vllm-steer[eval]"'
        ) from error
