"""The vLLM plugin: the only place that changes vLLM's global state.

``register`` runs in every vLLM process. It always adds the ``--steer-config`` flag and lets
``EngineArgs.create_engine_config`` notice a steer config; only when one is found are requests,
the engine core and the workers patched, here and in the processes that vLLM starts from here.
What is wrapped, in which process and why is declared in ``compat.names``; dynamic strength is a
feature of its own, whose functions are wrapped only where an engine can be asked for it.
"""

import os
import sys
from collections.abc import Mapping
from typing import Any, Final

from vllm_steer.environment import ACTIVE, is_disabled

STEERING: Final = "steering"
DYNAMIC: Final = "dynamic"


def register() -> None:
    """Entry point of the ``vllm.general_plugins`` group; calling it again changes nothing."""
    if is_disabled():
        return
    from vllm.engine.arg_utils import EngineArgs

    from vllm_steer.compat.patching import wrap

    wrap(EngineArgs, "add_cli_args", _with_flag, once=True, static=True)
    wrap(EngineArgs, "create_engine_config", _with_plan, once=True)
    active = os.environ.get(ACTIVE, "").split(",")
    if STEERING in active:
        patch_engine()
    if DYNAMIC in active:
        patch_dynamic_strength()


def patch_engine() -> None:
    """Patch what a steered engine needs, in this process and in those started from it."""
    from vllm.v1.core import block_pool, kv_cache_utils
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from vllm_steer.compat.patching import wrap
    from vllm_steer.serving.cache_key import with_steer_keys

    _activate(STEERING)
    extra_keys = "generate_block_hash_extra_keys"
    # Imported by name where blocks are hashed for events: one wrapper under every name.
    wrap(kv_cache_utils, extra_keys, with_steer_keys, once=True)
    for module in (block_pool, sys.modules.get("vllm.v1.simple_kv_offload.manager")):
        if module is not None:
            setattr(module, extra_keys, getattr(kv_cache_utils, extra_keys))
    wrap(InputProcessor, "_validate_params", _with_admission, once=True)
    wrap(EngineCore, "preprocess_add_request", _with_cache_key, once=True)
    wrap(WorkerWrapperBase, "init_device", _with_steered_worker, once=True)


def patch_dynamic_strength() -> None:
    """Patch what dynamic strength needs beside, if this vLLM has all of it."""
    from vllm_steer.compat.features import why_unavailable

    if why_unavailable("dynamic strength"):  # a request that asks for it is refused
        return
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState

    from vllm_steer.compat.patching import wrap
    from vllm_steer.serving.reports import outputs

    _activate(DYNAMIC)
    wrap(EngineCore, "add_request", _with_streams, once=True)
    wrap(OutputProcessor, "add_request", outputs.with_record, once=True)
    wrap(OutputProcessor, "process_outputs", outputs.with_strengths_taken, once=True)
    wrap(RequestState, "_new_completion_output", outputs.with_strengths_on_completion, once=True)


def _activate(feature: str) -> None:
    """Have the processes that are started from this one patch the same."""
    active = [name for name in os.environ.get(ACTIVE, "").split(",") if name]
    if feature not in active:
        os.environ[ACTIVE] = ",".join([*active, feature])


def _with_flag(original: Any, parser: Any) -> Any:
    from vllm_steer.serving.command_line import add_steer_config_flag

    return add_steer_config_flag(original(parser))


def _with_plan(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    given = self.additional_config
    if not isinstance(given, Mapping) or given.get("steer") is None:
        return original(self, *args, **kwargs)
    from vllm_steer.serving.plan_transport import resolved_additional_config
    from vllm_steer.serving.startup_checks import can_be_dynamic, check_engine

    resolved = resolved_additional_config(given)
    patch_engine()
    self.additional_config = resolved
    try:
        vllm_config = original(self, *args, **kwargs)
    finally:
        self.additional_config = given
    check_engine(vllm_config)
    if can_be_dynamic(vllm_config):
        patch_dynamic_strength()
    return vllm_config


def _with_admission(original: Any, self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
    from vllm_steer.serving.admission import admit

    admit(params, self.vllm_config)
    return original(self, params, *args, **kwargs)


def _with_cache_key(original: Any, self: Any, request: Any) -> Any:
    from vllm_steer.serving.engine_core import preprocess_request

    return preprocess_request(original, self, request)


def _with_streams(original: Any, self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    from vllm_steer.serving.streams.making import add_with_streams

    return add_with_streams(original, self, request, *args, **kwargs)


def _with_steered_worker(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    from vllm_steer.serving.worker import steer_worker

    result = original(self, *args, **kwargs)
    steer_worker(self.worker)
    return result
