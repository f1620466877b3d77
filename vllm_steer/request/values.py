"""Single values of a request: numbers and words."""

import math
from typing import Any, TypeVar

from vllm_steer.errors import SteerRequestError
from vllm_steer.request.value_limits import SPACES
from vllm_steer.untrusted_text import is_number, shown

Choice = TypeVar("Choice", bound=str)


def number(name: str, option: str, raw: Any, *, expected: str) -> float:
    """A finite number, also from a string; error messages include ``expected``."""
    try:
        value = _float(raw)
    except (ValueError, OverflowError):
        raise SteerRequestError(
            f"steer {name} has {option} {shown(raw)}; expected a number, {expected}"
        ) from None
    if not math.isfinite(value):
        raise SteerRequestError(f"steer {name} has {option} {shown(raw)}; it must be finite")
    return value


def choice(name: str, option: str, value: Any, allowed: tuple[Choice, ...]) -> Choice:
    """Check that a value is one of the allowed words."""
    for word in allowed:
        if isinstance(value, str) and value == word:
            return word
    raise SteerRequestError(
        f"steer {name} has {option} {shown(value)}; allowed: {', '.join(allowed)}"
    )


def key_name(key: Any) -> str:
    """A dict key as a name; a key that is not a string is described, for the error message."""
    return key if isinstance(key, str) else shown(key)


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError
    if isinstance(value, str) and not is_number(value.strip(SPACES)):
        raise ValueError
    return float(value)
