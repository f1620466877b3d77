"""Reads the option ``phase``: a word, or windows such as ``{"prompt": "-4:", "answer": "0:8"}``."""

import re
from collections.abc import Mapping
from typing import Any, Final, NoReturn

from vllm_steer.doses import PHASES, Bounds, Phase, TokenWindows
from vllm_steer.errors import SteerRequestError
from vllm_steer.request.values import choice, key_name
from vllm_steer.untrusted_text import listed, shown

_PARTS: Final = ("prompt", "answer")
_MOST_WINDOWS: Final = 4
_INDEX: Final = r"-?[0-9]{1,9}"
_WINDOW: Final = re.compile(rf"({_INDEX})?:({_INDEX})?|({_INDEX})")


def read_phase(name: str, value: Any, default: Phase) -> Phase | TokenWindows:
    """A phase, or windows of tokens; ``default`` for no value.

    Raises ``SteerRequestError`` for any other value.
    """
    if value is None:
        return default
    if not isinstance(value, Mapping):
        return choice(name, "phase", value, PHASES)
    unknown = sorted(set(map(key_name, value)) - set(_PARTS))
    if unknown or not value:
        raise SteerRequestError(
            f"steer {name} has the phase {shown(value)} with {listed(unknown, none='no key')}; "
            f"allowed: {', '.join(PHASES)}, or windows such as "
            '{"prompt": "-4:", "answer": "0:8"}'
        )
    return TokenWindows(**{part: _windows(name, part, each) for part, each in value.items()})


def _windows(name: str, part: str, value: Any) -> tuple[Bounds, ...]:
    """One window or a list of them."""
    windows = value if isinstance(value, list | tuple) else [value]
    if not 1 <= len(windows) <= _MOST_WINDOWS:
        _refuse(name, part, value, f"one window, or a list of up to {_MOST_WINDOWS}")
    return tuple(_bounds(name, part, window) for window in windows)


def _bounds(name: str, part: str, window: Any) -> Bounds:
    """The bounds of ``first:last``, or of the one token ``index``."""
    match = None
    if isinstance(window, str | int) and not isinstance(window, bool):
        match = _WINDOW.fullmatch(str(window).replace(" ", ""))
    if match is None:
        _refuse(name, part, window, "first:last, such as 0:8 or -4:, or one index")
    first, last, index = (None if text is None else int(text) for text in match.groups())
    if index is not None:
        first, last = index, None if index == -1 else index + 1
    if part == "answer" and min(first or 0, last or 0) < 0:
        _refuse(name, part, window, "indices from 0: an answer's length is not known beforehand")
    is_empty = last == 0 or (
        first is not None and last is not None and first >= last and (first < 0) == (last < 0)
    )
    if is_empty:
        _refuse(name, part, window, "at least one token")
    return first, last


def _refuse(name: str, part: str, window: Any, expected: str) -> NoReturn:
    raise SteerRequestError(
        f"steer {name} has the {part} window {shown(window)}; expected {expected}"
    )
