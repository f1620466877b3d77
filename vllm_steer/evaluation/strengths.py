"""Parses the strengths to try: a list, a range, or both."""

import math
from typing import Final

from vllm_steer.errors import SteerError
from vllm_steer.untrusted_text import is_number

_MOST: Final = 1000
_ALLOWED: Final = "expected numbers such as '-5,-2,2,5', or first:last:step such as '-5:5:2.5'"


def parse_strengths(given: str) -> tuple[float, ...]:
    """Ascending distinct strengths from ``"-5,-2,0"`` or ``"-5:5:2.5"``, always with 0.

    The last value of a range is included where a step meets it. Strength 0 is the unsteered model,
    which every figure is compared to. Raises ``SteerError`` for anything else.
    """
    found = {0.0}
    for part in given.split(","):
        found.update(_range(part, given) if ":" in part else [_number(part, given)])
    return tuple(sorted(found))


def parse_range(given: str) -> tuple[float, float]:
    """The two ends of ``"0:10"`` or ``"0:-10"``; ``SteerError`` unless they differ in size."""
    parts = given.split(":")
    if len(parts) != 2:
        raise SteerError(f"range is {given!r}; expected two strengths such as '0:10' or '0:-10'")
    near, far = (_number(part, given) for part in parts)
    if near * far < 0 or abs(far) <= abs(near):
        raise SteerError(
            f"range is {given!r}; expected from a strength near 0 to one further away on the same "
            "side, such as '0:10' or '0:-10'"
        )
    return near, far


def _range(part: str, given: str) -> list[float]:
    numbers = [_number(piece, given) for piece in part.split(":")]
    if len(numbers) != 3:
        raise _malformed(given)
    first, last, step = numbers
    if step == 0 or (last - first) / step < 0:
        raise _malformed(given)
    steps = (last - first) / step
    if steps >= _MOST:
        raise SteerError(f"strengths {given!r:.100} are more than {_MOST}; take a larger step")
    # Rounded, so that 3 steps of 0.1 are 0.3; the tolerance lets such a step meet the last value.
    return [round(first + i * step, 12) + 0.0 for i in range(math.floor(steps + 1e-9) + 1)]


def _number(text: str, given: str) -> float:
    if not is_number(text):
        raise _malformed(given)
    number = float(text)
    if not math.isfinite(number):
        raise SteerError(f"strengths are {given!r:.100}; each must be finite")
    return number + 0.0  # -0.0 is 0.0


def _malformed(given: str) -> SteerError:
    return SteerError(f"strengths are {given!r:.100}; {_ALLOWED}")
