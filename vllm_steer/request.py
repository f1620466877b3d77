"""A request's ``steer`` value: its grammar, and what it comes to under an engine's plan.

    "detox:5,humor"                  names with strengths; a name alone takes its default strength
    "friendly"  or  "friendly:0.5"   a preset: its mix, or its mix times a factor
    {"detox": 5, "humor": {"strength": 8, "layers": "20-31", "phase": "generation"}}
                                     a dict, or JSON in a string, with options for a steer:
                                     ``strength``, ``layers``, ``phase`` and ``schedule``
    "none", "" or {}                 no steer, whatever the config's default says

Strengths of one steer that is named more than once with like options add up.
"""

import json
import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from vllm_steer.config import NO_STEER
from vllm_steer.doses import PHASES, Dose, Phase
from vllm_steer.errors import SteerError, SteerRequestError
from vllm_steer.steers.delta import SCHEDULES, Schedule
from vllm_steer.steers.layers import parse_layers, positions_of

if TYPE_CHECKING:
    from vllm_steer.plan import SteerPlan

_ALLOWED = (
    "a string such as 'detox:5,humor', a JSON object in a string, or a dict such as {'detox': 5}"
)
_OPTIONS = ("strength", "layers", "phase", "schedule")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100
_LARGEST = float(np.finfo(np.float32).max)  # strengths are float32 on the device

Choice = TypeVar("Choice", bound=str)


class Dosable(Protocol):
    """What a dose has to fit: a steer, or what a plan says of one."""

    @property
    def kind(self) -> str: ...
    @property
    def site(self) -> str: ...
    @property
    def layers(self) -> tuple[int, ...] | None: ...
    @property
    def schedule(self) -> Schedule | None: ...
    @property
    def steps(self) -> int | None: ...
    @property
    def default_strength(self) -> float | None: ...


def resolve(asked: Any, plan: "SteerPlan") -> tuple[Dose, ...]:
    """The doses of a request: presets opened, like doses added up, zeros dropped.

    Raises ``SteerRequestError`` for anything that the plan does not know or does not admit.
    """
    strengths: dict[Dose, float] = {}
    for name, given in _parse(asked):
        for dose in _open_name(name, given, plan):
            like = replace(dose, strength=0.0)
            strengths[like] = strengths.get(like, 0.0) + dose.strength
    doses = tuple(replace(like, strength=v) for like, v in strengths.items() if v != 0)
    _check_limits(doses, plan)
    return doses


def check_request(asked: Any, plan: "SteerPlan", *, place: str) -> None:
    """Raise a start-up error if a value written in a config would not be admitted."""
    try:
        resolve(asked, plan)
    except SteerRequestError as error:
        raise SteerError(f"{place}: {error}") from None


def _parse(asked: Any) -> Iterator[tuple[str, Any]]:
    """Names with the number or the options given, None where a name stands alone."""
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


def _parse_dict(asked: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, given in asked.items():
        name = _word(key)
        yield name, given if isinstance(given, Mapping) else _number(name, given)


def read_dose(name: str, given: Any, steer: Dosable) -> Dose:
    """One steer's dose from a number, from its options, or from None for its default strength.

    Raises ``SteerRequestError`` for an option that is unknown or that the steer does not have.
    """
    if not isinstance(given, Mapping):
        given = {} if given is None else {"strength": given}
    options: Mapping[str, Any] = given
    _check_options(name, options, steer)
    default = 1.0 if steer.default_strength is None else steer.default_strength
    dose = Dose(
        steer=name,
        strength=_number(name, options.get("strength", default)),
        layers=_layers(name, options.get("layers"), steer),
        phase=_phase(name, options.get("phase")),
        schedule=_schedule(name, options.get("schedule"), steer),
    )
    if dose.phase == "generation" and (dose.schedule == "start" or steer.steps == 1):
        raise SteerRequestError(
            f"steer {name}: with schedule 'start' or a single step it acts at the last prompt "
            "token only, in phase 'generation' after it: together they do nothing; drop one"
        )
    return dose


def _check_options(name: str, options: Mapping[str, Any], steer: Dosable) -> None:
    unknown = sorted(set(map(_word, options)) - set(_OPTIONS))
    if unknown:
        raise SteerRequestError(
            f"steer {name} has unknown options {', '.join(unknown)}; allowed: {', '.join(_OPTIONS)}"
        )
    if steer.site == "head" and (
        {"layers", "schedule"} & set(options) or options.get("phase") not in (None, "all")
    ):
        raise SteerRequestError(
            f"steer {name} acts at the LM head: it has no layers, no schedule and no phase but "
            "'all'; give it a strength only"
        )


def _layers(name: str, given: Any, steer: Dosable) -> tuple[int, ...] | None:
    """The layers asked for; None where they are all that the steer has."""
    if given is None or steer.layers is None:
        return None
    try:
        layers = parse_layers(given)
        positions_of(layers, steer.layers)
    except SteerError as error:
        raise SteerRequestError(f"steer {name}: {error}") from None
    return None if layers == tuple(steer.layers) else layers


def _phase(name: str, given: Any) -> Phase:
    return "all" if given is None else _choice(name, "phase", given, PHASES)


def _schedule(name: str, given: Any, steer: Dosable) -> Schedule | None:
    if given is None:
        return steer.schedule
    if steer.schedule is None:
        raise SteerRequestError(
            f"steer {name} is of kind {steer.kind}: only a delta steer has a schedule; drop it"
        )
    return _choice(name, "schedule", given, SCHEDULES)


def _choice(name: str, option: str, given: Any, allowed: tuple[Choice, ...]) -> Choice:
    for choice in allowed:
        if given == choice:
            return choice
    raise SteerRequestError(
        f"steer {name} has {option} {_shown(given)}; allowed: {', '.join(allowed)}"
    )


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


def _open_name(name: str, given: Any, plan: "SteerPlan") -> Iterator[Dose]:
    if name in plan.presets:
        factor = _factor(name, given)
        for steer, in_mix in plan.presets[name].items():
            dose = read_dose(steer, in_mix, plan.steers[steer])
            yield replace(dose, strength=dose.strength * factor)
    elif name in plan.steers:
        yield read_dose(name, given, plan.steers[name])
    else:
        known = f"steers: {', '.join(sorted(plan.steers))}"
        if plan.presets:
            known += f"; presets: {', '.join(sorted(plan.presets))}"
        raise SteerRequestError(f"steer {_shown(name)} is unknown; {known}")


def _factor(name: str, given: Any) -> float:
    """What a preset's mix is multiplied with."""
    if not isinstance(given, Mapping):
        return 1.0 if given is None else _number(name, given)
    if set(given) - {"strength"}:
        raise SteerRequestError(
            f"{name} is a preset: it takes a strength only, a factor of its mix; layers, phase and "
            "schedule belong to its steers"
        )
    return _number(name, given.get("strength", 1.0))


def _check_limits(doses: Sequence[Dose], plan: "SteerPlan") -> None:
    limits = plan.limits
    if len(doses) > limits.max_steers_per_request:
        raise SteerRequestError(
            f"{len(doses)} steers are asked for; at most {limits.max_steers_per_request} are "
            "allowed per request (limits.max_steers_per_request)"
        )
    for dose in doses:
        if not abs(dose.strength) <= _LARGEST:
            raise SteerRequestError(
                f"steer {dose.steer} adds up to strength {dose.strength}; it must be finite"
            )
        if limits.max_strength is not None and abs(dose.strength) > limits.max_strength:
            raise SteerRequestError(
                f"steer {dose.steer} has strength {dose.strength:.15g}; allowed: "
                f"-{limits.max_strength:g} to {limits.max_strength:g} (limits.max_strength)"
            )


def _word(key: Any) -> str:
    """A dict's key as a name; what is no string is no name and is answered as it is shown."""
    return key if isinstance(key, str) else _shown(key)


def _shown(value: Any) -> str:
    """A value for a message, cut short: what is wrong with it may be its size."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        return f"a {type(value).__name__} too long to print"
