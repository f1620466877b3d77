"""Single values of a request: numbers and words."""

import math
from typing import Any, TypeVar

from vllm_steer.errors import SteerRequestError
from vllm_steer.foreign import is_number, shown
from vllm_steer.request.ceilings import SPACES

Choice = TypeVar("Choice", bound=str)


def number(name: str, option: str, given: Any, *, wanted: str) -> float:
    """A finite number, also from a string; ``SteerRequestError`` says what is ``wanted``."""
    try:
        value = _float(given)
    except (ValueError, OverflowError):
        raise SteerRequestError(
            f"steer {name} has {option} {shown(given)}; expected a number, {wanted}"
        ) from None
    if not math.isfinite(value):
        raise SteerRequestError(f"steer {name} has {option} {shown(given)}; it must be finite")
    return value


def choice(name: str, option: str, given: Any, allowed: tuple[Choice, ...]) -> Choice:
    """The one of the allowed words that was given."""
    for word in allowed:
        if isinstance(given, str) and given == word:
            return word
    raise SteerRequestError(
        f"steer {name} has {option} {shown(given)}; allowed: {', '.join(allowed)}"
    )


def key_name(key: Any) -> str:
    """A dict's key as a name; what is no string is no name and is answered as it is shown."""
    return key if isinstance(key, str) else shown(key)


def _float(given: Any) -> float:
    if isinstance(given, bool) or not isinstance(given, str | int | float):
        raise ValueError
    if isinstance(given, str) and not is_number(given.strip(SPACES)):
        raise ValueError
    return float(given)
