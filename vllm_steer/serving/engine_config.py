"""From a user's steer config to the plan inside ``VllmConfig``, and whether vLLM can carry it."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from packaging.version import InvalidVersion, Version

from vllm_steer.config import SteerConfig
from vllm_steer.errors import SteerError
from vllm_steer.plan import SteerPlan, is_plan

logger = logging.getLogger("vllm.vllm_steer")

OLDEST = Version("0.25.1")
NEWEST = Version("0.32")
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
    additional_config = vllm_config.additional_config
    if not isinstance(additional_config, Mapping) or not is_plan(additional_config.get("steer")):
        return None
    data = additional_config["steer"]
    if id(data) not in _plans:
        _plans[id(data)] = (data, SteerPlan.from_json(data))
    return _plans[id(data)][1]


def check_engine(vllm_config: Any) -> None:
    """Raise ``SteerError`` if the plan does not fit the model or a feature is in its way."""
    plan = plan_of(vllm_config)
    assert plan is not None
    _warn_of_version()
    _check_sizes(plan, vllm_config.model_config)
    for is_on, name, way_out in _REFUSED:
        if is_on(vllm_config):
            raise SteerError(f"steering does not work with {name}; {way_out}")


def _check_sizes(plan: SteerPlan, model_config: Any) -> None:
    hidden_size = model_config.get_hidden_size()
    vocab_size = model_config.get_vocab_size()
    for name, steer in plan.steers.items():
        if steer.variant != "offset" and steer.hidden_size != hidden_size:
            raise SteerError(
                f"steer {name}: {steer.path}: hidden size is {steer.hidden_size}; the model "
                f"{model_config.model} has {hidden_size}"
            )
        if steer.vocab_size not in (None, vocab_size):
            raise SteerError(
                f"steer {name}: {steer.path}: vocabulary size is {steer.vocab_size}; the model "
                f"{model_config.model} has {vocab_size}"
            )


def _warn_of_version() -> None:
    import vllm

    if not _is_known(vllm.__version__):
        logger.warning(
            "vLLM %s is outside the range that vllm-steer is made for (%s to %s); "
            "the start-up checks decide whether it can serve.",
            vllm.__version__,
            OLDEST,
            NEWEST,
        )


def _is_known(version: str) -> bool:
    try:
        known = Version(version)
    except InvalidVersion:
        return False
    return known >= OLDEST and (known.major, known.minor) <= (NEWEST.major, NEWEST.minor)


def _adaptive_verification(vllm_config: Any) -> bool:
    speculative = vllm_config.speculative_config
    return bool(getattr(speculative, "enable_adaptive_verification", False))


_REFUSED: tuple[tuple[Callable[[Any], bool], str, str], ...] = (
    (
        lambda c: c.model_config.runner_type != "generate",
        "pooling models",
        "a steer changes generated text only",
    ),
    (
        lambda c: getattr(c.parallel_config, "prefill_context_parallel_size", 1) > 1,
        "prefill context parallelism",
        "set prefill_context_parallel_size to 1",
    ),
    (
        lambda c: bool(getattr(c.parallel_config, "use_ubatching", False)),
        "micro-batch overlap (DBO)",
        "leave enable_dbo off",
    ),
    (
        lambda c: bool(getattr(c.parallel_config, "enable_batch_sharded_sampling", False)),
        "batch-sharded sampling",
        "leave enable_batch_sharded_sampling off",
    ),
    (
        lambda c: bool(getattr(c.cache_config, "kv_sharing_fast_prefill", False)),
        "KV-sharing fast prefill",
        "leave kv_sharing_fast_prefill off",
    ),
    (
        _adaptive_verification,
        "adaptive verification of draft tokens",
        "leave enable_adaptive_verification off",
    ),
)
