"""The names of loaded steers that a frontend resolves its requests by.

A request is resolved once: by the names as they are when it comes in. The keys of its steers travel
with it to the engine core and to the workers, so that it keeps them whatever the names come to
mean.
"""

from collections.abc import Callable, Container
from contextvars import ContextVar
from typing import Any, Final

from vllm_steer.doses import Dose
from vllm_steer.plan import SteerPlan
from vllm_steer.runtime.registry import LoadedNames, Registry
from vllm_steer.serving.plan_transport import plan_of
from vllm_steer.serving.request_args import FRONTEND_LOADED, LOADED, STEER, argument
from vllm_steer.serving.runtime.shared_folder import folder_of

REQUEST_NAMES: ContextVar[LoadedNames | None] = ContextVar("vllm_steer_names", default=None)
"""The names by which a server's current request is resolved; set by the middleware."""

_registries: dict[int, tuple[SteerPlan, Registry]] = {}
_NO_NAMES: Final = LoadedNames()


def registry_of(plan: SteerPlan) -> Registry:
    """The registry of a plan's engine in this process."""
    if id(plan) not in _registries:
        _registries[id(plan)] = plan, Registry(folder_of(plan.runtime))
    return _registries[id(plan)][1]


def names_now(plan: SteerPlan) -> LoadedNames:
    """The names by which the current request is resolved, or a new one would be."""
    if not plan.runtime.enabled:
        return _NO_NAMES
    names = REQUEST_NAMES.get()
    return registry_of(plan).names() if names is None else names


def known_names(plan: SteerPlan) -> Container[str]:
    """The names of the steer config and of what is loaded, without those of requests' files."""
    if not plan.runtime.enabled:
        return plan.steers
    return {*plan.steers, *registry_of(plan).names().steers}


def doses_now(value: Any, plan: SteerPlan) -> tuple[Dose, ...]:
    """The doses of a ``steer`` value in a frontend; None takes the default."""
    return plan.doses(value, names_now(plan).loaded_by(value, plan))


def with_loaded_steers(
    original: Callable[..., Any], processor: Any, *args: Any, **kwargs: Any
) -> Any:
    """``InputProcessor.process_inputs``, whose request carries the keys of its loaded steers."""
    plan = plan_of(processor.vllm_config)
    if plan is None or not plan.runtime.enabled:
        return original(processor, *args, **kwargs)
    params = kwargs["params"] if "params" in kwargs else args[2]
    loaded = names_now(plan).loaded_by(argument(params, STEER), plan)
    before = FRONTEND_LOADED.set(loaded)
    try:
        request = original(processor, *args, **kwargs)
    finally:
        FRONTEND_LOADED.reset(before)
    if request.sampling_params is not None:
        _carry(request.sampling_params, loaded)
    return request


def _carry(sampling_params: Any, loaded: Any) -> None:
    """Put the keys into the request's own copy of its parameters; a client's are dropped."""
    others = {k: v for k, v in (sampling_params.extra_args or {}).items() if k != LOADED}
    if loaded:
        sampling_params.extra_args = {**others, LOADED: dict(loaded)}
    elif argument(sampling_params, LOADED) is not None:
        sampling_params.extra_args = others or None
