"""Parsing of strengths: lists and ranges."""

import math
from typing import Final

from vllm_steer.errors import SteerError
from vllm_steer.untrusted_text import is_number

_MOST: Final = 1000
_ALLOWED: Final = "expected numbers such as '-5,-2,2,5', or first:last:step such as '-5:5:2.5'"


def parse_strengths(spec: str) -> tuple[float, ...]:
    """Distinct strengths, ascending and including 0, from ``"-5,-2,0"`` or ``"-5:5:2.5"``.

    A range includes its last value if a step reaches it. Strength 0 is the unsteered model, the
    reference of all figures. Raises ``SteerError`` for anything else.
    """
    strengths = {0.0}
    for part in spec.split(","):
        strengths.update(_range(part, spec) if ":" in part else [_number(part, spec)])
    return tuple(sorted(strengths))


def parse_range(spec: str) -> tuple[float, float]:
    """The ends of ``"0:10"`` or ``"0:-10"``. Raises ``SteerError`` unless the second is farther
    from 0.
    """
    parts = spec.split(":")
    if len(parts) != 2:
        raise SteerError(f"range is {spec!r}; expected two strengths such as '0:10' or '0:-10'")
    near, far = (_number(part, spec) for part in parts)
    if near * far < 0 or abs(far) <= abs(near):
        raise SteerError(
            f"range is {spec!r}; expected from a strength near 0 to one further away on the same "
            "side, such as '0:10' or '0:-10'"
        )
    return near, far


def _range(part: str, spec: str) -> list[float]:
    numbers = [_number(piece, spec) for piece in part.split(":")]
    if len(numbers) != 3:
        raise _malformed(spec)
    first, last, step = numbers
    if step == 0 or (last - first) / step < 0:
        raise _malformed(spec)
    steps = (last - first) / step
    if steps >= _MOST:
        raise SteerError(f"strengths {spec!r:.100} are more than {_MOST}; use a larger step")
    # Rounding makes 3 steps of 0.1 equal 0.3; the tolerance includes such a last value.
    return [round(first + i * step, 12) + 0.0 for i in range(math.floor(steps + 1e-9) + 1)]


def _number(text: str, spec: str) -> float:
    if not is_number(text):
        raise _malformed(spec)
    number = float(text)
    if not math.isfinite(number):
        raise SteerError(f"strengths are {spec!r:.100}; each must be finite")
    return number + 0.0  # -0.0 is 0.0


def _malformed(spec: str) -> SteerError:
    return SteerError(f"strengths are {spec!r:.100}; {_ALLOWED}")
