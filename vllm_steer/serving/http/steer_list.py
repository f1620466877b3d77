"""``GET /v1/steers``: the steers and presets that a request may name."""

from collections.abc import Mapping
from typing import Any

from vllm_steer.config import Limits
from vllm_steer.plan import PlannedSteer, SteerPlan


def steer_list(plan: SteerPlan) -> dict[str, Any]:
    """The response body: the steers by name, then the presets.

    ``runtime`` says whether steers can be loaded while serving.
    """
    steers = [steer_entry(name, steer, plan.limits) for name, steer in plan.steers.items()]
    presets = [preset_entry(name, mix) for name, mix in plan.presets.items()]
    return {"object": "list", "runtime": False, "data": [*steers, *presets]}


def steer_entry(name: str, steer: PlannedSteer, limits: Limits) -> dict[str, Any]:
    """One steer of the list.

    layers  indices from 0, null at the LM head
    mode    ``add`` or ``rotate`` of a vector, null for the other kinds
    limit   the largest magnitude of a strength, null without a limit
    digest  SHA-256 of the steer's content
    in_use  null: it is not counted which requests have a steer of the config
    """
    return {
        "id": name,
        "object": "steer",
        "kind": steer.kind,
        "site": steer.site,
        "layers": None if steer.layers is None else list(steer.layers),
        "mode": steer.mode,
        "default_strength": steer.default_strength,
        "limit": limits.max_strength,
        "digest": steer.content,
        "source": "config",
        "in_use": None,
    }


def preset_entry(name: str, mix: Mapping[str, Any]) -> dict[str, Any]:
    """One preset of the list, with the strengths or options of its steers."""
    return {"id": name, "object": "preset", "steers": dict(mix)}
