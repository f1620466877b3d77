"""Resolves a ``steer`` value under an engine's plan: expands presets, checks limits."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from vllm_steer.config import DYNAMIC, Limits
from vllm_steer.doses import Dose
from vllm_steer.errors import SteerError, SteerRequestError
from vllm_steer.foreign import listed, shown
from vllm_steer.request.ceilings import check_plain
from vllm_steer.request.options import Dosable, read_dose, read_strength
from vllm_steer.request.parsing import Options, parse


class Admitting(Protocol):
    """What decides on a request: steers and presets by name, and limits. A ``SteerPlan`` is one."""

    @property
    def steers(self) -> Mapping[str, Dosable]: ...

    @property
    def presets(self) -> Mapping[str, Mapping[str, Any]]: ...

    @property
    def limits(self) -> Limits: ...


_LARGEST = float(np.finfo(np.float32).max)  # strengths are float32 on the device


def resolve(asked: Any, plan: Admitting) -> tuple[Dose, ...]:
    """The doses of a request: presets opened, like doses added up, zeros dropped.

    Raises ``SteerRequestError`` for anything that the plan does not know or does not admit.
    """
    named = [dose for name, options in parse(asked) for dose in _open_name(name, options, plan)]
    _check_dynamic_alone(named)
    strengths: dict[Dose, float] = {}
    for dose in named:
        like = replace(dose, strength=0.0)
        strengths[like] = strengths.get(like, 0.0) + dose.strength
    doses = tuple(replace(like, strength=v) for like, v in strengths.items() if v != 0)
    _check_limits(doses, plan)
    check_plain(asked)
    return doses


def check_request(asked: Any, plan: Admitting, *, place: str) -> None:
    """Raise a start-up error if a value written in a config would not be admitted."""
    try:
        resolve(asked, plan)
    except SteerRequestError as error:
        raise SteerError(f"{place}: {error}") from None


def _open_name(name: str, options: Options, plan: Admitting) -> Iterator[Dose]:
    if name in plan.presets:
        factor = _factor(name, options)
        for steer, in_mix in plan.presets[name].items():
            dose = read_dose(steer, in_mix, plan.steers[steer])
            yield replace(dose, strength=dose.strength * factor)
    elif name in plan.steers:
        yield read_dose(name, options, plan.steers[name])
    else:
        known = f"steers: {listed(sorted(plan.steers))}"
        if plan.presets:
            known += f"; presets: {listed(sorted(plan.presets))}"
        raise SteerRequestError(f"steer {shown(name)} is unknown; {known}")


def _factor(name: str, options: Options) -> float:
    """What a preset's mix is multiplied with, the maximum of a dynamic steer too."""
    if options.get("strength") == DYNAMIC:
        raise SteerRequestError(
            f"{name} is a preset: its strength is a factor of its mix, a number; ask for 'dynamic' "
            "in the mix, or for its steers by their names"
        )
    if set(options) - {"strength"}:
        raise SteerRequestError(
            f"{name} is a preset: it takes a strength only, a factor of its mix; all other options "
            "belong to its steers"
        )
    return read_strength(name, options.get("strength", 1.0))


def _check_dynamic_alone(doses: Sequence[Dose]) -> None:
    times = Counter(dose.steer for dose in doses)
    for dose in doses:
        if dose.dynamic and times[dose.steer] > 1:
            raise SteerRequestError(
                f"steer {dose.steer} is asked for more than once, with a dynamic strength among "
                "them, which is computed for all that the steer does; ask for it once"
            )


def _check_limits(doses: Sequence[Dose], plan: Admitting) -> None:
    limits = plan.limits
    if len(doses) > limits.max_steers_per_request:
        raise SteerRequestError(
            f"{len(doses)} steers are asked for; at most {limits.max_steers_per_request} are "
            "allowed per request (limits.max_steers_per_request)"
        )
    for dose in doses:
        what = "max" if dose.dynamic else "strength"
        if not abs(dose.strength) <= _LARGEST:
            raise SteerRequestError(
                f"steer {dose.steer} adds up to {what} {dose.strength}; it must be finite"
            )
        if limits.max_strength is not None and abs(dose.strength) > limits.max_strength:
            raise SteerRequestError(
                f"steer {dose.steer} has {what} {dose.strength:.15g}; allowed: "
                f"-{limits.max_strength:g} to {limits.max_strength:g} (limits.max_strength)"
            )
