"""The vLLM plugin: the only place that changes vLLM's global state.

``register`` runs in every vLLM process. It always adds the ``--steer-config`` flag and lets
``EngineArgs.create_engine_config`` notice a steer config; only when one is found are requests,
the engine core and the workers patched, here and in the processes that vLLM starts from here.

| patched                                  | process     | why                                     |
|------------------------------------------|-------------|-----------------------------------------|
| ``EngineArgs.add_cli_args``              | frontend    | the flag                                |
| ``EngineArgs.create_engine_config``      | frontend    | config to resolved plan                 |
| ``InputProcessor._validate_params``      | frontend    | a bad request fails at admission        |
| ``OutputProcessor.add_request``          | frontend    | who is to be told the strengths         |
| ``OutputProcessor.process_outputs``      | frontend    | strengths off the engine's outputs      |
| ``RequestState._new_completion_output``  | frontend    | strengths put on the user's outputs     |
| ``EngineCore.preprocess_add_request``    | engine core | the same for other frontends; cache key |
| ``EngineCore.add_request``               | engine core | streams enter the scheduler (instance)  |
| ``generate_block_hash_extra_keys``       | engine core | keys of the blocks that steers change   |
| ``WorkerWrapperBase.init_device``        | workers     | bank, model and runner (per instance)   |
"""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

ACTIVE = "VLLM_STEER_ACTIVE"
DISABLE = "VLLM_STEER_DISABLE"
_MARK = "__vllm_steer__"
_EXTRA_KEYS = "generate_block_hash_extra_keys"


def register() -> None:
    """Entry point of the ``vllm.general_plugins`` group; calling it again changes nothing."""
    if os.environ.get(DISABLE, "").strip().lower() not in ("", "0", "false"):
        return
    from vllm.engine.arg_utils import EngineArgs

    from vllm_steer.serving.command_line import add_steer_config_flag

    _wrap(EngineArgs, "add_cli_args", _with_flag(add_steer_config_flag), static=True)
    _wrap(EngineArgs, "create_engine_config", _with_plan)
    if os.environ.get(ACTIVE) == "1":
        patch_engine()


def patch_engine() -> None:
    """Patch what a steered engine needs, in this process and in those started from it."""
    from vllm.v1.core import block_pool, kv_cache_utils
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from vllm_steer.serving.cache_key import with_steer_keys
    from vllm_steer.serving.reports import outputs

    os.environ[ACTIVE] = "1"
    # Imported by name where blocks are hashed for events: one wrapper under every name.
    _wrap(kv_cache_utils, _EXTRA_KEYS, with_steer_keys)
    for module in (block_pool, sys.modules.get("vllm.v1.simple_kv_offload.manager")):
        if module is not None:
            setattr(module, _EXTRA_KEYS, getattr(kv_cache_utils, _EXTRA_KEYS))
    _wrap(InputProcessor, "_validate_params", _with_admission)
    _wrap(OutputProcessor, "add_request", outputs.with_record)
    _wrap(OutputProcessor, "process_outputs", outputs.with_strengths_taken)
    _wrap(RequestState, "_new_completion_output", outputs.with_strengths_on_completion)
    _wrap(EngineCore, "preprocess_add_request", _with_cache_key)
    _wrap(EngineCore, "add_request", _with_streams)
    _wrap(WorkerWrapperBase, "init_device", _with_steered_worker)


def _wrap(
    owner: Any, name: str, make: Callable[[Callable[..., Any]], Any], *, static: bool = False
) -> None:
    """Replace ``owner.name`` by ``make(original)``, once."""
    original = getattr(owner, name)
    if hasattr(original, _MARK):
        return
    wrapper = functools.wraps(original)(make(original))
    setattr(wrapper, _MARK, True)
    setattr(owner, name, staticmethod(wrapper) if static else wrapper)


def _with_flag(add_flag: Callable[[Any], Any]) -> Callable[[Callable[..., Any]], Any]:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def add_cli_args(parser: Any) -> Any:
            return add_flag(original(parser))

        return add_cli_args

    return make


def _with_plan(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_steer.serving.engine_config import check_engine, resolved_additional_config

        given = self.additional_config
        resolved = resolved_additional_config(given)
        if resolved is None:
            return original(self, *args, **kwargs)
        patch_engine()
        self.additional_config = resolved
        try:
            vllm_config = original(self, *args, **kwargs)
        finally:
            self.additional_config = given
        check_engine(vllm_config)
        return vllm_config

    return create_engine_config


def _with_admission(original: Callable[..., Any]) -> Callable[..., Any]:
    def validate_params(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_steer.serving.admission import admit

        admit(params, self.vllm_config)
        return original(self, params, *args, **kwargs)

    return validate_params


def _with_cache_key(original: Callable[..., Any]) -> Callable[..., Any]:
    def preprocess_add_request(self: Any, request: Any) -> Any:
        from vllm_steer.serving.streams.making import preprocess_with_streams

        return preprocess_with_streams(original, self, request)

    return preprocess_add_request


def _with_streams(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_steer.serving.streams.making import add_with_streams

        return add_with_streams(original, self, request, *args, **kwargs)

    return add_request


def _with_steered_worker(original: Callable[..., Any]) -> Callable[..., Any]:
    def init_device(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_steer.serving.worker import steer_worker

        result = original(self, *args, **kwargs)
        steer_worker(self.worker)
        return result

    return init_device
