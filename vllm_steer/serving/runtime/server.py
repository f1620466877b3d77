"""A server's part in loading steers: what changes its engines, and what it restores."""

from collections.abc import Awaitable, Callable
from typing import Any, Final

from vllm_steer.plan import SteerPlan
from vllm_steer.serving.plan_transport import plan_of
from vllm_steer.serving.runtime.engines import AsyncEngines
from vllm_steer.serving.runtime.loading import SteerLoading
from vllm_steer.serving.runtime.names import registry_of

_RESTORED: Final = "steers_are_restored"
_LOADING: Final = "steer_loading"


def loading_of(engine_client: Any) -> SteerLoading:
    """What changes the steers of a server's engines; one for each ``AsyncLLM``."""
    loading: SteerLoading | None = getattr(engine_client, _LOADING, None)
    if loading is None:
        config = engine_client.vllm_config
        plan = plan_of(config)
        assert isinstance(plan, SteerPlan)
        loading = SteerLoading(plan, config, registry_of(plan), AsyncEngines(engine_client))
        setattr(engine_client, _LOADING, loading)
    return loading


async def with_restored_steers(
    original: Callable[..., Awaitable[Any]], engine_client: Any, *args: Any, **kwargs: Any
) -> Any:
    """``AsyncLLM.get_supported_tasks``, which a server awaits before it serves.

    Raises ``SteerError`` if a steer that was loaded before a restart cannot be loaded again.
    """
    plan = plan_of(engine_client.vllm_config)
    if plan is not None and plan.runtime.enabled and not hasattr(engine_client, _RESTORED):
        await loading_of(engine_client).restore()
        setattr(engine_client, _RESTORED, True)
    return await original(engine_client, *args, **kwargs)
