"""Resolves a ``steer`` value under an engine's plan: expands presets, checks limits."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from vllm_steer.config import DYNAMIC, Limits
from vllm_steer.doses import Dose
from vllm_steer.errors import SteerError, SteerRequestError
from vllm_steer.request.gates import check_gate, with_keys
from vllm_steer.request.options import SteerAttributes, read_dose, read_strength
from vllm_steer.request.parsing import Options, parse
from vllm_steer.request.value_limits import check_plain
from vllm_steer.steers.sites import acts_at_head
from vllm_steer.untrusted_text import listed, shown


class SteerCatalog(Protocol):
    """The steers, presets and limits that resolve a request; ``SteerPlan`` has them."""

    @property
    def steers(self) -> Mapping[str, SteerAttributes]: ...

    @property
    def presets(self) -> Mapping[str, Mapping[str, Any]]: ...

    @property
    def limits(self) -> Limits: ...


_MAX_FLOAT32 = float(np.finfo(np.float32).max)  # strengths are float32 on the device


def resolve(value: Any, plan: SteerCatalog) -> tuple[Dose, ...]:
    """Resolve a value to doses: expand presets, add equal doses, drop zero strengths.

    Raises ``SteerRequestError`` for unknown names and for values outside the limits.
    """
    expanded = [
        dose for name, options in parse(value) for dose in _expand_name(name, options, plan)
    ]
    _check_dynamic_alone(expanded)
    strengths: dict[Dose, float] = {}
    for dose in expanded:
        like = replace(dose, strength=0.0)
        strengths[like] = strengths.get(like, 0.0) + dose.strength
    doses = tuple(
        replace(like, strength=strength) for like, strength in strengths.items() if strength != 0
    )
    _check_once_at_head(doses, plan)
    _check_no_turned_map(doses, plan)
    _check_limits(doses, plan)
    check_plain(value)
    return doses


def check_request(value: Any, plan: SteerCatalog, *, source: str) -> None:
    """Raise ``SteerError`` if a value in a config would not be admitted."""
    try:
        resolve(value, plan)
    except SteerRequestError as error:
        raise SteerError(f"{source}: {error}") from None


def _expand_name(name: str, options: Options, plan: SteerCatalog) -> Iterator[Dose]:
    if name in plan.presets:
        factor = _factor(name, options)
        for steer, mix_entry in plan.presets[name].items():
            dose = read_dose(steer, mix_entry, plan.steers[steer])
            check_gate(dose, plan.steers[steer], plan.steers)
            yield replace(dose, strength=dose.strength * factor)
    elif name in plan.steers:
        dose = read_dose(name, options, plan.steers[name])
        check_gate(dose, plan.steers[name], plan.steers)
        yield with_keys(dose, plan.steers)
    else:
        available = f"steers: {listed(sorted(plan.steers))}"
        if plan.presets:
            available += f"; presets: {listed(sorted(plan.presets))}"
        raise SteerRequestError(f"steer {shown(name)} is unknown; {available}")


def _factor(name: str, options: Options) -> float:
    """The factor of a preset's mix; it also multiplies the maximum of a dynamic steer."""
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


def _check_once_at_head(doses: Sequence[Dose], plan: SteerCatalog) -> None:
    """Raise ``SteerRequestError`` for an LM-Steer with and without a condition, or with two."""
    at_head = Counter(dose.steer for dose in doses if acts_at_head(plan.steers[dose.steer]))
    for name, times in at_head.items():
        if times > 1:
            raise SteerRequestError(
                f"steer {name} acts at the LM head and is asked for under {times} conditions; "
                "ask for it once"
            )


def _check_no_turned_map(doses: Sequence[Dose], plan: SteerCatalog) -> None:
    """Raise ``SteerRequestError`` for a low-rank map at a place where a rotation rescales the sum.

    A map is added after the directions of its place: the norm would not be kept.
    """
    steers = [(dose, plan.steers[dose.steer]) for dose in doses]
    for dose, steer in steers:
        for other_dose, other in steers if steer.kind == "low_rank" else ():
            if getattr(other, "mode", None) != "rotate" or other.site != steer.site:
                continue
            others = other_dose.layers or other.layers or ()
            if set(dose.layers or steer.layers or ()) & set(others):
                raise SteerRequestError(
                    f"steer {dose.steer} is a low-rank map and {other_dose.steer} rotates at the "
                    f"same site {steer.site} of the same layers; give them other layers"
                )


def _check_limits(doses: Sequence[Dose], plan: SteerCatalog) -> None:
    limits = plan.limits
    if len(doses) > limits.max_steers_per_request:
        raise SteerRequestError(
            f"{len(doses)} steers are asked for; at most {limits.max_steers_per_request} are "
            "allowed per request (limits.max_steers_per_request)"
        )
    for dose in doses:
        quantity = "max" if dose.dynamic else "strength"
        if not abs(dose.strength) <= _MAX_FLOAT32:
            raise SteerRequestError(
                f"steer {dose.steer} adds up to {quantity} {dose.strength}; it must be finite"
            )
        if limits.max_strength is not None and abs(dose.strength) > limits.max_strength:
            raise SteerRequestError(
                f"steer {dose.steer} has {quantity} {dose.strength:.15g}; allowed: "
                f"-{limits.max_strength:g} to {limits.max_strength:g} (limits.max_strength)"
            )
