"""Candidate strengths of each method and property, and the requests they stand for."""

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
"""Doses by property; in the engine, a steer has the name of its property."""

Part = Literal["choosing", "test", "examples"]

NOT_FOR_THIS_KIND: Final = (
    "does not apply: start and dim are schedules of step deltas, and no steer here is one"
)
NOTHING_DYNAMIC: Final = "does not apply: no property here is dynamic"


@dataclass(frozen=True)
class Choice:
    """A method with a dose for every property."""

    method: Method
    doses: Doses

    def of(self, combination: Combination) -> dict[str, Any]:
        """The ``steer`` value of a request for a combination."""
        return {name: dict(self.doses[name]) for name in combination if name in self.doses}


@dataclass(frozen=True)
class Candidate:
    """A text set of a comparison: the part it belongs to and the steers it is generated with."""

    part: Part
    combination: Combination
    method: Method
    steer: Mapping[str, Any]

    @property
    def name(self) -> str:
        """A file name such as ``test.fr+cheer.fixed.1b2c3d4e``, equal for equal requests."""
        if self.method == "none":  # the same texts for every combination
            where = f".{label(self.combination)}" if self.part == "examples" else ""
            return f"{self.part}{where}.none"
        digest = hashlib.sha256(json.dumps(self.steer, sort_keys=True).encode()).hexdigest()
        return f"{self.part}.{label(self.combination)}.{self.method}.{digest[:8]}"

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata in each row of its texts."""
        return {
            "part": self.part,
            "combination": None if self.method == "none" else label(self.combination),
            "method": self.method,
            "steer": dict(self.steer),
        }


def make_candidate(part: Part, combination: Combination, choice: Choice) -> Candidate:
    """The text set of a combination with a choice.

    If none of the doses is dynamic or follows the schedule of the choice's method, the texts are
    those of fixed strengths and are generated only once.
    """
    steer = choice.of(combination)
    follows = choice.method in ("none", "fixed") or any(
        choice.method in (dose.get("schedule"), dose["strength"]) for dose in steer.values()
    )
    return Candidate(part, combination, choice.method if follows else "fixed", steer)


def choices(method: Method, spec: ComparisonSpec, steers: Mapping[str, Steer]) -> list[Choice]:
    """All choices of a method: the product of the doses that each property tries.

    With the schedules ``start`` and ``dim``, step deltas follow the schedule and other steers keep
    their fixed strengths. Dynamic strengths share ``top_p`` and ``kl``.
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
    """The reason why a combination has no row of a method; None if it has one."""
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
    scheduled = method if method in SCHEDULES else SCHEDULES[0]
    schedule = {"schedule": scheduled} if isinstance(steer, DeltaSteer) else {}
    for strength in prop.strengths:
        yield {"strength": strength, **layers, **prop.options, **schedule}
