"""The plan inside ``VllmConfig.additional_config``, as it travels to every process."""

from collections.abc import Mapping
from typing import Any

from vllm_steer.compat import options
from vllm_steer.config import SteerConfig
from vllm_steer.plan import SteerPlan, is_plan

_plans: dict[int, tuple[Any, SteerPlan]] = {}


def resolved_additional_config(additional_config: Any) -> dict[str, Any] | None:
    """``additional_config`` with its ``steer`` value resolved to a plan; None without one."""
    if not isinstance(additional_config, Mapping) or additional_config.get("steer") is None:
        return None
    steer = additional_config["steer"]
    plan = steer if is_plan(steer) else SteerPlan.of(SteerConfig.load(steer)).to_json()
    return {**additional_config, "steer": plan}


def plan_of(vllm_config: Any) -> SteerPlan | None:
    """The plan that an engine was started with, None for an engine without steers."""
    additional_config = options.additional_config(vllm_config)
    if not isinstance(additional_config, Mapping) or not is_plan(additional_config.get("steer")):
        return None
    data = additional_config["steer"]
    if id(data) not in _plans:
        _plans[id(data)] = (data, SteerPlan.from_json(data))
    return _plans[id(data)][1]
