"""Single values of a request: numbers, words, and how they are shown in a message."""

import math
import reprlib
from typing import Any, TypeVar

from vllm_steer.errors import SteerRequestError

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100

Choice = TypeVar("Choice", bound=str)


def number(name: str, option: str, given: Any, *, wanted: str) -> float:
    """A finite number, also from a string; ``SteerRequestError`` says what is ``wanted``."""
    try:
        if isinstance(given, bool) or not isinstance(given, str | int | float):
            raise ValueError
        value = float(given)
    except (ValueError, OverflowError):
        raise SteerRequestError(
            f"steer {name} has {option} {shown(given)}; a number is wanted, {wanted}"
        ) from None
    if not math.isfinite(value):
        raise SteerRequestError(f"steer {name} has {option} {shown(given)}; it must be finite")
    return value


def choice(name: str, option: str, given: Any, allowed: tuple[Choice, ...]) -> Choice:
    """The one of the allowed words that was given."""
    for word in allowed:
        if given == word:
            return word
    raise SteerRequestError(
        f"steer {name} has {option} {shown(given)}; allowed: {', '.join(allowed)}"
    )


def key_name(key: Any) -> str:
    """A dict's key as a name; what is no string is no name and is answered as it is shown."""
    return key if isinstance(key, str) else shown(key)


def shown(value: Any) -> str:
    """A value for a message, cut short: what is wrong with it may be its size."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        return f"a {type(value).__name__} too long to print"
