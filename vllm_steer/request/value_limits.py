"""Size limits of a ``steer`` value, checked before it is parsed.

The limits are far above what a request needs, and low enough that parsing a value is cheap. A
Python value may contain itself or share containers, so the traversal is bounded as well.
"""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, Final, NoReturn

from vllm_steer.errors import SteerRequestError
from vllm_steer.untrusted_text import shown

MAX_CHARACTERS: Final = 16_000
"""Characters of a text, or of an object as JSON."""
MAX_PARTS: Final = 64
"""Parts between commas, or keys of an object."""
MAX_OPTIONS: Final = 16
MAX_DEPTH: Final = 4
SPACES: Final = " \t\r\n"
_INTEGER_RANGE: Final = (-(2**63), 2**64)
_PLAIN_TYPES: Final = (str, int, float, bool, type(None))


def check_text(text: str) -> None:
    """Raise ``SteerRequestError`` for a text that is too long or has too many parts."""
    if len(text) > MAX_CHARACTERS:
        too_long()
    parts = text.count(",") + 1
    if parts > MAX_PARTS and not text.lstrip(SPACES).startswith("{"):
        _too_many_parts(parts)


def check_object(steer: Mapping[Any, Any]) -> None:
    """Raise ``SteerRequestError`` for an object that is too large or too deep."""
    if len(steer) > MAX_PARTS:
        _too_many_parts(len(steer))
    for options in steer.values():
        if isinstance(options, Mapping) and len(options) > MAX_OPTIONS:
            raise SteerRequestError(
                f"steer has {len(options)} options for one steer; at most {MAX_OPTIONS} are allowed"
            )
    remaining = MAX_CHARACTERS
    for value, depth in _walk(steer):
        remaining -= _length(value)
        if remaining < 0:
            too_long()
        if depth > MAX_DEPTH:
            raise SteerRequestError(
                f"steer is nested more than {MAX_DEPTH} deep; a steer's options are two levels"
            )


def check_plain(steer: Any) -> None:
    """Raise ``SteerRequestError`` for a value that cannot be sent to vLLM's engine process.

    Only JSON types can be sent, without NumPy numbers and subclasses of ``str``. The value must be
    within the limits.
    """
    for value, _ in _walk(steer):
        if isinstance(value, dict | list | tuple):
            continue
        if type(value) not in _PLAIN_TYPES:
            raise SteerRequestError(
                f"steer holds {shown(value)} of type {type(value).__name__}, which does not travel "
                "to the engine; allowed: plain numbers, strings, dicts and lists"
            )
        if isinstance(value, int) and not _INTEGER_RANGE[0] <= value < _INTEGER_RANGE[1]:
            raise SteerRequestError(
                f"steer holds {shown(value)}; whole numbers have at most 64 bits, larger ones are "
                "written like 1e30"
            )


def too_long() -> NoReturn:
    """Raise the error for a value of more than ``MAX_CHARACTERS`` characters."""
    raise SteerRequestError(
        f"steer is longer than {MAX_CHARACTERS} characters, the most that is allowed"
    )


def _too_many_parts(parts: int) -> NoReturn:
    raise SteerRequestError(f"steer has {parts} parts; at most {MAX_PARTS} are allowed")


def _walk(root: Any) -> Iterable[tuple[Any, int]]:
    """A value and its descendants with their depth; infinite if a value contains itself."""
    pending = [(root, 0)]
    while pending:
        value, depth = pending.pop()
        yield value, depth
        if isinstance(value, Mapping):
            pending += [
                (inner, depth + 1)
                for pair in islice(value.items(), MAX_CHARACTERS + 1)
                for inner in pair
            ]
        elif isinstance(value, list | tuple):
            pending += [(inner, depth + 1) for inner in value[: MAX_CHARACTERS + 1]]


def _length(value: Any) -> int:
    """About the characters that a value adds to its JSON, brackets and commas among them."""
    if isinstance(value, str | bytes):
        return len(value) + 3
    if isinstance(value, int):
        return value.bit_length() // 4 + 2
    return 2
