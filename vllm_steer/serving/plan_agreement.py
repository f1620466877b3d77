"""All nodes of an engine, and all engines behind a frontend, must serve the same plan.

Each node reads its own command line. Ranks of one engine compare their plans in the key-value store
of ``torch.distributed``; a frontend asks its data-parallel engines. Both happen once, at start-up.
"""

import hashlib
import json
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, Final

import torch

from vllm_steer.compat import options
from vllm_steer.environment import HEADLESS, is_active
from vllm_steer.errors import SteerError
from vllm_steer.plan import SteerPlan
from vllm_steer.serving.plan_transport import plan_of
from vllm_steer.serving.request_args import RejectedSteer

CHECK: Final = "check_steer_plan"
"""The method of an engine core that ``with_checked_engines`` calls."""
TIMEOUT: Final = timedelta(minutes=2)
_ADVICE: Final = "start every node with the same --steer-config"
_CHECKED: Final = "steer_plan_is_checked"


def plan_digest(plan: SteerPlan) -> str:
    """A digest of all that a plan does to requests: steers by content, never by path."""
    data = plan.to_json()
    for steer in data["steers"].values():
        del steer["path"], steer["overrides"]
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def check_ranks(plan: SteerPlan, timeout: timedelta = TIMEOUT) -> None:
    """Wait until all ranks of this process's world have this plan.

    Raises ``SteerError`` for a rank with another plan, or without one after ``timeout``.
    """
    distributed = torch.distributed
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return
    store: Any = distributed.distributed_c10d._get_default_store()
    rank, digest = distributed.get_rank(), plan_digest(plan).encode()
    store.set(_key(rank), digest)
    for other in range(distributed.get_world_size()):
        try:
            store.wait([_key(other)], timeout)
        except RuntimeError:
            raise SteerError(
                f"rank {other} has no steer plan and rank {rank} has one: {_ADVICE}"
            ) from None
        if store.get(_key(other)) != digest:
            raise SteerError(f"ranks {other} and {rank} have different steer plans: {_ADVICE}")


def require_checked(core: Any) -> None:
    """Raise ``RejectedSteer`` in an engine core whose frontend, on another node, has no plan."""
    if is_active(HEADLESS) and not hasattr(core, _CHECKED):
        raise RejectedSteer(f"the node of the frontend has no steer plan: {_ADVICE}")


def check_engine_core(core: Any, digest: str) -> None:
    """Raise ``SteerError`` if an engine core's plan is not the frontend's."""
    plan = plan_of(core.vllm_config)
    if plan is None or plan_digest(plan) != digest:
        found = "no steer plan" if plan is None else "another steer plan"
        raise SteerError(f"this engine has {found}: {_ADVICE}")
    setattr(core, _CHECKED, True)


async def with_checked_engines(
    original: Callable[..., Awaitable[Any]], engine_client: Any, *args: Any, **kwargs: Any
) -> Any:
    """``AsyncLLM.get_supported_tasks``, which a server awaits before it serves.

    Raises ``SteerError`` if a data-parallel engine is not steered as the frontend is.
    """
    config = engine_client.vllm_config
    plan = plan_of(config)
    is_parallel = plan is not None and options.data_parallel_size(config) > 1
    if plan is not None and is_parallel and not hasattr(engine_client, _CHECKED):
        core_client = engine_client.engine_core
        try:
            await core_client.call_utility_async(CHECK, plan_digest(plan))
        except Exception as error:
            raise SteerError(
                f"a data-parallel engine is not steered as this frontend is: {_ADVICE} ({error})"
            ) from error
        setattr(engine_client, _CHECKED, True)
    return await original(engine_client, *args, **kwargs)


def _key(rank: int) -> str:
    return f"vllm_steer/plan/{rank}"
