"""The steers and presets of an engine as data: what ``GET /v1/steers`` answers."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_steer.plan import SteerPlan
from vllm_steer.planned_steer import PlannedSteer
from vllm_steer.steers.layers import format_layers

Entry = dict[str, Any]


def steer_list(
    plan: SteerPlan, loaded: Mapping[str, PlannedSteer], in_use: Mapping[str, int]
) -> list[Entry]:
    """All steers, those ``loaded`` at run time included, and the presets, by name.

    ``in_use`` has live requests by the steer's name in the device tables.
    """
    return list(_entries(plan, loaded, in_use))


def steer_entry(
    name: str, steer: PlannedSteer, limit: float | None, in_use: int | None = None
) -> Entry:
    """One steer; ``digest`` is of its content, ``limit`` the largest strength (None: any).

    ``low`` and ``high`` of a steer that has bounds; what a condition tests.
    """
    entry = {
        "id": name,
        "object": "steer",
        "kind": steer.kind,
        "site": steer.site,
        "layers": None if steer.layers is None else format_layers(steer.layers),
        "mode": steer.mode,
        "default_strength": steer.default_strength,
        "limit": limit,
        "digest": steer.content,
        "source": "config" if steer.key is None else "runtime",
        "in_use": in_use,
    }
    if steer.has_bounds:
        entry |= {"low": _number(steer.low), "high": _number(steer.high)}
    if steer.condition is not None:
        entry |= steer.condition.model_dump()
    return entry


def _number(bound: float) -> float | str:
    """A bound in JSON, which has no infinite numbers."""
    return bound if math.isfinite(bound) else str(bound)


def _entries(
    plan: SteerPlan, loaded: Mapping[str, PlannedSteer], in_use: Mapping[str, int]
) -> Iterator[Entry]:
    limit = plan.limits.max_strength
    steers = {**plan.steers, **loaded}
    for name, steer in sorted(steers.items()):
        count = in_use.get(steer.key or name, 0) if plan.runtime.enabled else None
        yield steer_entry(name, steer, limit, count)
    for name, mix in sorted(plan.presets.items()):
        yield {"id": name, "object": "preset", "steers": mix, "source": "config"}
