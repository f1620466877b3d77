"""How large a foreign file's parts may be: checked before memory is taken or time is spent."""

from collections.abc import Mapping
from typing import Any, Final

import torch

from vllm_steer.errors import SteerError

LARGEST_HEADER: Final = 1_000_000
"""Bytes of what describes a file's tensors: a pickle, a safetensors header, a zip directory."""
MOST_TENSORS: Final = 1000
DEEPEST: Final = 32
"""Containers within each other."""
MOST_VALUES: Final = 100_000
"""Values in a container and all that it holds; one that is held twice counts twice."""
_FREE: Final = 64 * 2**20
_TIMES: Final = 4


def check_nesting(value: Any, what: str) -> None:
    """Raise ``SteerError`` for a value that is nested too deep or holds too much.

    A container that is shared counts wherever it stands, for so it is read later: sixty pairs, each
    twice in the next one, are refused like the 2**60 values that they stand for.
    """
    left = MOST_VALUES
    waiting = [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        left -= 1
        if left < 0:
            raise SteerError(f"{what} holds more than {MOST_VALUES} values")
        inner = _held(item)
        if inner and depth == DEEPEST:
            raise SteerError(f"{what} is nested more than {DEEPEST} deep")
        if len(inner) > left:
            raise SteerError(f"{what} holds more than {MOST_VALUES} values")
        waiting.extend((one, depth + 1) for one in inner)


def check_memory(needed: int, file_size: int, what: str) -> None:
    """Raise ``SteerError`` if a file asks for far more memory than it has bytes."""
    allowed = max(_FREE, _TIMES * file_size)
    if needed > allowed:
        raise SteerError(
            f"{what} would take {needed} bytes of memory out of a file of {file_size}; allowed: "
            f"{_TIMES} times the file, or {_FREE}"
        )


def _held(item: Any) -> Any:
    if isinstance(item, Mapping):
        return [*item.keys(), *item.values()]
    if isinstance(item, list | tuple | set | frozenset):
        return item
    if isinstance(item, torch.Tensor) or not hasattr(item, "__dict__"):
        return ()
    return list(vars(item).values())
