"""Size limits of a ``steer`` value, checked before it is parsed.

Far above what a request needs, and low enough that reading a value costs next to nothing. A value
in Python can hold itself, or one tuple sixty times over: the walk over it is bounded as well.
"""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, Final, NoReturn

from vllm_steer.errors import SteerRequestError
from vllm_steer.foreign import shown

LONGEST: Final = 16_000
"""Characters of a text, or of an object as JSON."""
MOST_PARTS: Final = 64
"""Parts between commas, or keys of an object."""
MOST_OPTIONS: Final = 16
DEEPEST: Final = 4
SPACES: Final = " \t\r\n"
_BITS: Final = (-(2**63), 2**64)
_PLAIN: Final = (str, int, float, bool, type(None))


def check_text(text: str) -> None:
    """Raise ``SteerRequestError`` for a text that is too long or has too many parts."""
    if len(text) > LONGEST:
        too_long()
    parts = text.count(",") + 1
    if parts > MOST_PARTS and not text.lstrip(SPACES).startswith("{"):
        _too_many_parts(parts)


def check_object(asked: Mapping[Any, Any]) -> None:
    """Raise ``SteerRequestError`` for an object that is too large or too deep."""
    if len(asked) > MOST_PARTS:
        _too_many_parts(len(asked))
    for given in asked.values():
        if isinstance(given, Mapping) and len(given) > MOST_OPTIONS:
            raise SteerRequestError(
                f"steer has {len(given)} options for one steer; at most {MOST_OPTIONS} are allowed"
            )
    left = LONGEST
    for value, depth in _walk(asked):
        left -= _length(value)
        if left < 0:
            too_long()
        if depth > DEEPEST:
            raise SteerRequestError(
                f"steer is nested more than {DEEPEST} deep; a steer's options are two levels"
            )


def check_plain(asked: Any) -> None:
    """Raise ``SteerRequestError`` for a value that does not travel to vLLM's engine process.

    Only what JSON has travels, exactly: NumPy's numbers and subclasses of ``str`` do not. For
    values under the ceilings.
    """
    for value, _ in _walk(asked):
        if isinstance(value, dict | list | tuple):
            continue
        if type(value) not in _PLAIN:
            raise SteerRequestError(
                f"steer holds {shown(value)} of type {type(value).__name__}, which does not travel "
                "to the engine; allowed: plain numbers, strings, dicts and lists"
            )
        if isinstance(value, int) and not _BITS[0] <= value < _BITS[1]:
            raise SteerRequestError(
                f"steer holds {shown(value)}; whole numbers have at most 64 bits, larger ones are "
                "written like 1e30"
            )


def too_long() -> NoReturn:
    """Raise the error for a value of more than ``LONGEST`` characters."""
    raise SteerRequestError(f"steer is longer than {LONGEST} characters, the most that is allowed")


def _too_many_parts(parts: int) -> NoReturn:
    raise SteerRequestError(f"steer has {parts} parts; at most {MOST_PARTS} are allowed")


def _walk(asked: Any) -> Iterable[tuple[Any, int]]:
    """A value and all inside it with their depth, in any order; endless for a value without end."""
    waiting = [(asked, 0)]
    while waiting:
        value, depth = waiting.pop()
        yield value, depth
        if isinstance(value, Mapping):
            waiting += [
                (inner, depth + 1) for pair in islice(value.items(), LONGEST + 1) for inner in pair
            ]
        elif isinstance(value, list | tuple):
            waiting += [(inner, depth + 1) for inner in value[: LONGEST + 1]]


def _length(value: Any) -> int:
    """About the characters that a value adds to its JSON, brackets and commas among them."""
    if isinstance(value, str | bytes):
        return len(value) + 3
    if isinstance(value, int):
        return value.bit_length() // 4 + 2
    return 2
