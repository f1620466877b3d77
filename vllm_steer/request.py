"""A request's ``steer`` value: its grammar, and what it comes to under an engine's plan.

    "detox:5,humor"                  names with strengths; a name alone takes its default strength
    "friendly"  or  "friendly:0.5"   a preset: its mix, or its mix times a factor
    {"detox": 5, "humor": {"strength": 8}}       the same as a dict, or as JSON in a string
    "none", "" or {}                 no steer, whatever the config's default says

Strengths of one steer that is named more than once add up.
"""

import json
import math
import reprlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_steer.config import NO_STEER
from vllm_steer.errors import SteerError, SteerRequestError

if TYPE_CHECKING:
    from vllm_steer.plan import SteerPlan

_ALLOWED = (
    "a string such as 'detox:5,humor', a JSON object in a string, or a dict such as {'detox': 5}"
)
_OPTIONS = ("strength", "layers", "phase")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100
_LARGEST = float(np.finfo(np.float32).max)  # strengths are float32 on the device


def resolve(asked: Any, plan: "SteerPlan") -> dict[str, float]:
    """Steer names to strengths, presets opened and zeros dropped.

    Raises ``SteerRequestError`` for anything that the plan does not know or does not admit.
    """
    doses: dict[str, float] = {}
    for name, given in _parse(asked):
        for steer, strength in _open_name(name, given, plan):
            doses[steer] = doses.get(steer, 0.0) + strength
    doses = {name: strength for name, strength in doses.items() if strength != 0}
    _check_limits(doses, plan)
    return doses


def check_request(asked: Any, plan: "SteerPlan", *, place: str) -> None:
    """Raise a start-up error if a value written in a config would not be admitted."""
    try:
        resolve(asked, plan)
    except SteerRequestError as error:
        raise SteerError(f"{place}: {error}") from None


def _parse(asked: Any) -> Iterator[tuple[str, float | None]]:
    """Names with the number given, None where a name stands alone."""
    if isinstance(asked, str):
        text = asked.strip()
        if text.startswith("{"):
            yield from _parse_dict(_from_json(text))
        elif text.startswith("["):
            raise SteerRequestError(f"steer is {_shown(text)}; allowed: {_ALLOWED}")
        elif text not in ("", NO_STEER):
            yield from map(_parse_part, text.split(","))
    elif isinstance(asked, Mapping):
        yield from _parse_dict(asked)
    else:
        raise SteerRequestError(f"steer is {_shown(asked)}; allowed: {_ALLOWED}")


def _from_json(text: str) -> Mapping[str, Any]:
    try:
        value: Mapping[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SteerRequestError(f"steer {_shown(text)} is not JSON: {error}") from None
    return value


def _parse_part(part: str) -> tuple[str, float | None]:
    name, colon, number = (piece.strip() for piece in part.partition(":"))
    if not name or (colon and not number):
        raise SteerRequestError(f"steer has an incomplete part {_shown(part)}; allowed: {_ALLOWED}")
    return name, _number(name, number) if colon else None


def _parse_dict(asked: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    for name, given in asked.items():
        if isinstance(given, Mapping):
            yield str(name), _strength_option(str(name), given)
        else:
            yield str(name), _number(str(name), given)


def _strength_option(name: str, options: Mapping[str, Any]) -> float | None:
    unknown = sorted(set(map(str, options)) - set(_OPTIONS))
    if unknown:
        raise SteerRequestError(
            f"steer {name} has unknown options {', '.join(unknown)}; allowed: {', '.join(_OPTIONS)}"
        )
    if "layers" in options or options.get("phase", "all") != "all":
        raise SteerRequestError(
            f"steer {name} acts at the LM head: it has no layers and no phase but 'all'; "
            "give it a strength only"
        )
    return _number(name, options["strength"]) if "strength" in options else None


def _number(name: str, given: Any) -> float:
    try:
        if isinstance(given, bool) or not isinstance(given, str | int | float):
            raise ValueError
        number = float(given)
    except (ValueError, OverflowError):
        raise SteerRequestError(
            f"steer {name} has strength {_shown(given)}; a number is wanted, such as {name}:1.5"
        ) from None
    if not math.isfinite(number):
        raise SteerRequestError(f"steer {name} has strength {_shown(given)}; it must be finite")
    return number


def _open_name(name: str, given: float | None, plan: "SteerPlan") -> Iterator[tuple[str, float]]:
    if name in plan.presets:
        factor = 1.0 if given is None else given
        yield from ((steer, strength * factor) for steer, strength in plan.presets[name].items())
    elif name in plan.steers:
        yield name, plan.steers[name].default_strength if given is None else given
    else:
        known = f"steers: {', '.join(sorted(plan.steers))}"
        if plan.presets:
            known += f"; presets: {', '.join(sorted(plan.presets))}"
        raise SteerRequestError(f"steer {_shown(name)} is unknown; {known}")


def _check_limits(doses: Mapping[str, float], plan: "SteerPlan") -> None:
    limits = plan.limits
    if len(doses) > limits.max_steers_per_request:
        raise SteerRequestError(
            f"{len(doses)} steers are asked for; at most {limits.max_steers_per_request} are "
            "allowed per request (limits.max_steers_per_request)"
        )
    for name, strength in doses.items():
        if not abs(strength) <= _LARGEST:
            raise SteerRequestError(
                f"steer {name} adds up to strength {strength}; it must be finite"
            )
        if limits.max_strength is not None and abs(strength) > limits.max_strength:
            raise SteerRequestError(
                f"steer {name} has strength {strength:.15g}; allowed: -{limits.max_strength:g} to "
                f"{limits.max_strength:g} (limits.max_strength)"
            )


def _shown(value: Any) -> str:
    """A value for a message, cut short: what is wrong with it may be its size."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        return f"a {type(value).__name__} too long to print"
