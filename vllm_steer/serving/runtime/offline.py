"""Loads and unloads steers of an ``LLM`` in this process."""

from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from vllm_steer.errors import SteerError
from vllm_steer.serving.plan_transport import plan_of
from vllm_steer.serving.runtime.engines import SyncEngines
from vllm_steer.serving.runtime.listing import Entry, steer_list
from vllm_steer.serving.runtime.loading import SteerLoading, SteerSource
from vllm_steer.serving.runtime.names import registry_of

T = TypeVar("T")


def load_steer_into(
    llm: Any, name: str, path: str | Path, *, load_inplace: bool = False, **options: Any
) -> None:
    """Load a steer into a running ``LLM``, for requests from now on.

    ``options`` are the keys of a steer in a steer config. ``load_inplace`` replaces a steer that
    was loaded under this name; requests that use the old one keep it. The engine's steer config
    needs ``runtime: {enabled: true}``. Raises ``SteerError``, and nothing has changed then.
    """
    source = SteerSource(Path(path).absolute(), options)
    _finished(_loading(llm).load(name, source, in_place=load_inplace))


def unload_steer_from(llm: Any, name: str) -> None:
    """Unload a steer that was loaded into a running ``LLM``; requests that use it keep it.

    Raises ``SteerError`` for a name that is not loaded, or that the steer config has.
    """
    _finished(_loading(llm).unload(name))


def steers_of(llm: Any) -> Sequence[Entry]:
    """The steers and presets that requests may name, as ``GET /v1/steers`` of a server has them."""
    config = llm.llm_engine.vllm_config
    plan = plan_of(config)
    if plan is None:
        return []
    if not plan.runtime.enabled:
        return steer_list(plan, {}, {})
    loading = _loading(llm)
    return steer_list(plan, loading.registry.names().steers, _finished(loading.in_use()))


def _loading(llm: Any) -> SteerLoading:
    config = llm.llm_engine.vllm_config
    plan = plan_of(config)
    if plan is None or not plan.runtime.enabled:
        raise SteerError(
            "this engine loads no steers: give it a steer config with runtime: {enabled: true}"
        )
    return SteerLoading(plan, config, registry_of(plan), SyncEngines(llm))


def _finished(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never has to wait: ``SyncEngines`` block instead."""
    try:
        work.send(None)
    except StopIteration as finished:
        result: T = finished.value
        return result
    work.close()
    raise RuntimeError("a synchronous engine has waited")
