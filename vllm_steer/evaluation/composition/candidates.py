"""The strengths that each method tries for each property, and their requests."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from vllm_steer.evaluation.composition.spec import Combination, ComparisonSpec, Method, label
from vllm_steer.steers import DeltaSteer, Steer
from vllm_steer.steers.schedules import SCHEDULES

Doses = Mapping[str, Mapping[str, Any]]
"""By property, which is the steer's name in the engine as well."""

Part = Literal["choosing", "test", "examples"]

NOT_FOR_THIS_KIND: Final = (
    "does not apply: start and dim are schedules of step deltas, and no steer here is one"
)
NOTHING_DYNAMIC: Final = "does not apply: no property here is dynamic"


@dataclass(frozen=True)
class Choice:
    """A method with a dose for every property of the file."""

    method: Method
    doses: Doses

    def of(self, combination: Combination) -> dict[str, Any]:
        """The ``steer`` value of a request for some of the properties."""
        return {name: dict(self.doses[name]) for name in combination if name in self.doses}


@dataclass(frozen=True)
class Candidate:
    """Texts to write: which part of the comparison they are for, and under which steers."""

    part: Part
    combination: Combination
    method: Method
    steer: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Such as ``test.fr+cheer.fixed.1b2c3d4e``: the same for the same request."""
        if self.method == "none":  # the same texts for every combination
            where = f".{label(self.combination)}" if self.part == "examples" else ""
            return f"{self.part}{where}.none"
        digest = hashlib.sha256(json.dumps(self.steer, sort_keys=True).encode()).hexdigest()
        return f"{self.part}.{label(self.combination)}.{self.method}.{digest[:8]}"

    @property
    def metadata(self) -> dict[str, Any]:
        """What the rows of its texts say."""
        return {
            "part": self.part,
            "combination": None if self.method == "none" else label(self.combination),
            "method": self.method,
            "steer": dict(self.steer),
        }


def make_candidate(part: Part, combination: Combination, choice: Choice) -> Candidate:
    """The texts of a combination under a choice.

    Where none of its doses follows the choice's schedule or is dynamic, they are those of fixed
    strengths, and are written once.
    """
    steer = choice.of(combination)
    follows = choice.method in ("none", "fixed") or any(
        choice.method in (dose.get("schedule"), dose["strength"]) for dose in steer.values()
    )
    return Candidate(part, combination, choice.method if follows else "fixed", steer)


def choices(method: Method, spec: ComparisonSpec, steers: Mapping[str, Steer]) -> list[Choice]:
    """Every choice that a method has: the product of what each property has to try.

    On the schedules ``start`` and ``dim`` the deltas follow the schedule; steers of other kinds
    have none and stay at their fixed strengths. Dynamic strengths share ``top_p`` and ``kl``.
    """
    if method == "none":
        return [Choice(method, {})]
    if method == "dynamic":
        options = [{"top_p": p, "kl": kl} for p in spec.top_p for kl in spec.kl]
    else:
        options = [{}]
    return [
        Choice(method, dict(zip(spec.properties, doses, strict=True)))
        for dynamic_options in options
        for doses in itertools.product(
            *(
                list(_doses(name, method, dynamic_options, spec, steers[name]))
                for name in spec.properties
            )
        )
    ]


def skip_reason(
    method: Method, combination: Combination, spec: ComparisonSpec, steers: Mapping[str, Steer]
) -> str | None:
    """Why a combination has no row of a method; None where it has one."""
    deltas = any(isinstance(steers[name], DeltaSteer) for name in combination)
    if method in SCHEDULES[1:] and not deltas:
        return NOT_FOR_THIS_KIND
    if method == "dynamic" and not any(spec.properties[name].dynamic for name in combination):
        return NOTHING_DYNAMIC
    return None


def _doses(
    name: str,
    method: Method,
    dynamic_options: Mapping[str, Any],
    spec: ComparisonSpec,
    steer: Steer,
) -> Iterator[dict[str, Any]]:
    prop = spec.properties[name]
    layers = {} if prop.layers is None else {"layers": prop.layers}
    if method == "dynamic" and prop.dynamic:
        for maximum in prop.max:
            yield {"strength": "dynamic", "max": maximum, **dynamic_options, **layers}
        return
    phase = {} if prop.phase is None else {"phase": prop.phase}
    scheduled = method if method in SCHEDULES else SCHEDULES[0]
    schedule = {"schedule": scheduled} if isinstance(steer, DeltaSteer) else {}
    for strength in prop.strengths:
        yield {"strength": strength, **layers, **phase, **schedule}
