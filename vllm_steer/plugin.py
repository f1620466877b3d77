"""The vLLM plugin: wraps vLLM's classes and modules.

Instances (worker, runner, model, scheduler, output queue) are wrapped where they are made, in
``serving``. No other file changes vLLM's global state.

``register`` runs in every vLLM process. It always adds the ``--steer-config`` flag and lets
``EngineArgs.create_engine_config`` notice a steer config; only when one is found are requests,
the engine core and the workers patched, here and in the processes that vLLM starts from here.
What is wrapped, in which process and why is declared in ``compat.names``; dynamic strength is a
feature of its own, whose functions are wrapped only where an engine can be asked for it.
"""

import sys
from collections.abc import Mapping
from typing import Any

from vllm_steer.environment import (
    HEADLESS,
    LOADING,
    STEERING,
    STREAM_REQUESTS,
    STRENGTH_REPORTS,
    activate,
    is_active,
    is_disabled,
)

_RUN_BATCH = (
    "__main__",
    "vllm.entrypoints.launchers.run_batch",
    "vllm.entrypoints.openai.run_batch",
)
"""Where ``vllm run-batch`` is, by version and by how it is started."""


def register() -> None:
    """Entry point of the ``vllm.general_plugins`` group; calling it again changes nothing."""
    if is_disabled():
        return
    from vllm.engine.arg_utils import EngineArgs

    from vllm_steer.compat.patching import wrap

    wrap(EngineArgs, "add_cli_args", _with_flag, once=True, static=True)
    wrap(EngineArgs, "create_engine_config", _with_plan, once=True)
    patch_active()


def patch_active() -> None:
    """Wrap what is active in this process, once."""
    if is_active(STEERING):
        _patch_steering()
    if is_active(STRENGTH_REPORTS):
        _patch_reports()
    if is_active(STREAM_REQUESTS):
        _patch_streams()
    if is_active(LOADING):
        _patch_loading()


def _patch_steering() -> None:
    from vllm.v1.core import block_pool, kv_cache_utils
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from vllm_steer.compat.patching import wrap
    from vllm_steer.serving import applied
    from vllm_steer.serving.cache_key import with_steer_keys
    from vllm_steer.serving.plan_agreement import CHECK, check_engine_core

    extra_keys = "generate_block_hash_extra_keys"
    # Imported by name where blocks are hashed for events: one wrapper under every name.
    wrap(kv_cache_utils, extra_keys, with_steer_keys, once=True)
    for module in (block_pool, sys.modules.get("vllm.v1.simple_kv_offload.manager")):
        if module is not None:
            setattr(module, extra_keys, getattr(kv_cache_utils, extra_keys))
    _patch_run_batch()
    wrap(InputProcessor, "_validate_params", _with_admission, once=True)
    for engine in (LLMEngine, AsyncLLM):
        wrap(engine, "__init__", applied.with_plan_for_outputs, once=True)
    wrap(OutputProcessor, "add_request", applied.with_applied_of_request, once=True)
    wrap(RequestState, "_new_request_output", applied.with_applied_steers, once=True)
    wrap(EngineCore, "preprocess_add_request", _with_engine_core_admission, once=True)
    setattr(EngineCore, CHECK, check_engine_core)
    wrap(WorkerWrapperBase, "init_device", _with_steered_worker, once=True)


def _patch_engines() -> None:
    """Wrap what makes an engine in a frontend, so that its requests are counted by steer."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine

    from vllm_steer.compat.patching import wrap
    from vllm_steer.serving.request_counting import with_counted_requests

    for engine in (AsyncLLM, LLMEngine):
        wrap(engine, "__init__", with_counted_requests, once=True)


def _patch_receiving_frontend() -> None:
    """Wrap what checks requests whose prompt another instance has computed."""
    from vllm.v1.engine.input_processor import InputProcessor

    from vllm_steer.compat.patching import wrap
    from vllm_steer.serving.disaggregation import with_checked_kv

    wrap(InputProcessor, "process_inputs", with_checked_kv, once=True)


def _patch_data_parallel_frontend() -> None:
    """Wrap what asks the engines of a data-parallel frontend for their plans."""
    from vllm.v1.engine.async_llm import AsyncLLM

    from vllm_steer.compat.patching import wrap
    from vllm_steer.serving.plan_agreement import with_checked_engines

    wrap(AsyncLLM, "get_supported_tasks", with_checked_engines, once=True)


def _patch_run_batch() -> None:
    """Wrap what ``vllm run-batch`` does with a line, in the process that runs this command."""
    for name in _RUN_BATCH:
        module: Any = sys.modules.get(name)
        if not hasattr(module, "BatchRequestInput"):
            continue
        from vllm_steer.compat.patching import wrap
        from vllm_steer.serving import run_batch

        wrap(module, "run_batch", run_batch.with_engine_config, once=True)
        wrap(module, "run_request", run_batch.with_line, once=True)
        module.BatchRequestInput = run_batch.with_steer_fields(module.BatchRequestInput)


def _patch_reports() -> None:
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState

    from vllm_steer.compat.patching import wrap
    from vllm_steer.serving.strength_reports import outputs

    wrap(OutputProcessor, "add_request", outputs.with_sequence_strengths, once=True)
    wrap(OutputProcessor, "process_outputs", outputs.with_strengths_taken, once=True)
    wrap(RequestState, "_new_completion_output", outputs.with_strengths_on_completion, once=True)


def _patch_streams() -> None:
    from vllm.v1.engine.core import EngineCore

    from vllm_steer.compat.patching import wrap

    wrap(EngineCore, "add_request", _with_streams, once=True)


def _patch_loading() -> None:
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor

    from vllm_steer.compat.patching import wrap
    from vllm_steer.serving.runtime import engine_core, names

    wrap(InputProcessor, "process_inputs", names.with_loaded_steers, once=True)
    wrap(EngineCore, "add_request", engine_core.with_arrival, once=True)
    for method in engine_core.METHODS:
        setattr(EngineCore, method, getattr(engine_core, method))


def _patch_serving_frontend() -> None:
    """Wrap what a server awaits before it serves."""
    from vllm.v1.engine.async_llm import AsyncLLM

    from vllm_steer.compat.patching import wrap
    from vllm_steer.serving.runtime.server import with_restored_steers

    wrap(AsyncLLM, "get_supported_tasks", with_restored_steers, once=True)


def _with_flag(original: Any, parser: Any) -> Any:
    from vllm_steer.serving.command_line import add_steer_config_flag

    return add_steer_config_flag(original(parser))


def _with_plan(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    user_config = self.additional_config
    if not isinstance(user_config, Mapping) or user_config.get("steer") is None:
        return original(self, *args, **kwargs)
    from vllm_steer.compat import options
    from vllm_steer.serving.activation import activate_steering
    from vllm_steer.serving.plan_transport import resolved_additional_config
    from vllm_steer.serving.startup_checks import check_engine

    resolved = resolved_additional_config(user_config)
    activate_steering(serves_dynamic=self.speculative_config is None)
    if resolved is not None and resolved["steer"]["runtime"]["enabled"]:
        activate(LOADING)
    if kwargs.get("headless"):
        activate(HEADLESS)
    patch_active()
    self.additional_config = resolved
    try:
        vllm_config = original(self, *args, **kwargs)
    finally:
        self.additional_config = user_config
    check_engine(vllm_config)
    if is_active(LOADING):
        _patch_serving_frontend()
    _patch_engines()
    if options.data_parallel_size(vllm_config) > 1:
        _patch_data_parallel_frontend()
    if options.kv_transfer_config(vllm_config) is not None:
        _patch_receiving_frontend()
    return vllm_config


def _with_admission(original: Any, self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
    from vllm_steer.serving.admission import admit

    admit(params, self.vllm_config)
    return original(self, params, *args, **kwargs)


def _with_engine_core_admission(original: Any, self: Any, request: Any) -> Any:
    from vllm_steer.serving.preprocessing import preprocess_request

    return preprocess_request(original, self, request)


def _with_streams(original: Any, self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    from vllm_steer.serving.dynamic.stream_requests import add_with_streams

    return add_with_streams(original, self, request, *args, **kwargs)


def _with_steered_worker(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    from vllm_steer.serving.worker import steer_worker

    result = original(self, *args, **kwargs)
    steer_worker(self.worker)
    return result
