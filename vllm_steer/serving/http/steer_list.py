"""``GET /v1/steers``: the steers and presets that a request may name."""

from typing import Any

from vllm_steer.plan import SteerPlan
from vllm_steer.serving.runtime.listing import steer_list
from vllm_steer.serving.runtime.server import loading_of


async def listed_steers(plan: SteerPlan, state: Any) -> dict[str, Any]:
    """The response body; ``runtime`` says whether steers can be loaded while serving."""
    if not plan.runtime.enabled:
        return _list(plan, steer_list(plan, {}, {}))
    loading = loading_of(state.engine_client)
    in_use = await loading.in_use()
    return _list(plan, steer_list(plan, loading.registry.names().steers, in_use))


def _list(plan: SteerPlan, entries: list[dict[str, Any]]) -> dict[str, Any]:
    return {"object": "list", "runtime": plan.runtime.enabled, "data": entries}
