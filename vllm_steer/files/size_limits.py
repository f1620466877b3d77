"""Size limits of untrusted files, checked before memory is allocated."""

from collections.abc import Mapping
from typing import Any, Final

import torch

from vllm_steer.errors import SteerError

MAX_HEADER_BYTES: Final = 1_000_000
"""Bytes of a pickle, a safetensors header or a zip directory."""
MAX_TENSORS: Final = 1000
MAX_DEPTH: Final = 32
"""Nested containers."""
MAX_VALUES: Final = 100_000
"""Values in a container and its descendants; a value that is referenced twice counts twice."""
_ALWAYS_ALLOWED_BYTES: Final = 64 * 2**20
_MAX_FILE_SIZES: Final = 4


def check_nesting(value: Any, subject: str) -> None:
    """Raise ``SteerError`` for a value that is nested too deep or has too many values.

    A shared container counts once per reference, as later code traverses it once per reference:
    sixty pairs, each referenced twice by the next one, count as 2**60 values.
    """
    remaining = MAX_VALUES
    pending = [(value, 0)]
    while pending:
        item, depth = pending.pop()
        remaining -= 1
        if remaining < 0:
            raise SteerError(f"{subject} holds more than {MAX_VALUES} values")
        inner = _children(item)
        if inner and depth == MAX_DEPTH:
            raise SteerError(f"{subject} is nested more than {MAX_DEPTH} deep")
        if len(inner) > remaining:
            raise SteerError(f"{subject} holds more than {MAX_VALUES} values")
        pending.extend((child, depth + 1) for child in inner)


def check_memory(needed: int, file_size: int, subject: str) -> None:
    """Raise ``SteerError`` if reading needs far more memory than the file has bytes."""
    allowed = max(_ALWAYS_ALLOWED_BYTES, _MAX_FILE_SIZES * file_size)
    if needed > allowed:
        raise SteerError(
            f"{subject} needs {needed} bytes of memory and the file has {file_size}; allowed: "
            f"{_MAX_FILE_SIZES} times the file size, or {_ALWAYS_ALLOWED_BYTES}"
        )


def _children(item: Any) -> Any:
    if isinstance(item, Mapping):
        return [*item.keys(), *item.values()]
    if isinstance(item, list | tuple | set | frozenset):
        return item
    if isinstance(item, torch.Tensor) or not hasattr(item, "__dict__"):
        return ()
    return list(vars(item).values())
