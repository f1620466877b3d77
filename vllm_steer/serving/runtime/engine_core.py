"""An engine core's part in loading steers: what stays in device memory, and where it is placed.

A frontend calls ``steer_read`` and ``steer_write``, and ``steer_forget`` where one of them failed.
What is in use is asked of the scheduler when it matters, so that nothing has to be counted. A
request counts from its admission on, before the scheduler has it.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Final

from vllm_steer.planned_steer import PlannedSteer
from vllm_steer.runtime.refusal import CONFLICT, UNFIT, Refused
from vllm_steer.runtime.residency import Residency
from vllm_steer.runtime_config import Room
from vllm_steer.serving.plan_transport import plan_of
from vllm_steer.serving.request_args import LOADED, STREAM, RejectedSteer, argument, doses_of
from vllm_steer.serving.runtime.reserved_bank import READING, READY, Reply

METHODS: Final = (
    *("steer_read", "steer_write", "steer_forget", "steer_lease"),
    *("steer_release", "steer_usage", "steer_room"),
)
"""The methods of an engine core that a frontend calls."""
LONGEST_READING: Final = 120.0
"""Seconds that the file of a steer may take."""
_STATE: Final = "steer_residency"
_MAKING: Final = Lock()


@dataclass
class EngineResidency:
    """The reserved memory of an engine core; ``arriving``: keys of requests that the scheduler does
    not have yet, by id; ``being_read``: since when the workers read a steer, by key.
    """

    residency: Residency
    arriving: dict[str, tuple[str, ...]] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)
    being_read: dict[str, float] = field(default_factory=dict)


def residency_of(core: Any) -> EngineResidency:
    """The residency of an engine core, made when it is first asked for."""
    with _MAKING:  # requests are admitted in another thread than steers are loaded in
        state: EngineResidency | None = getattr(core, _STATE, None)
        if state is None:
            plan = plan_of(core.vllm_config)
            room = Room() if plan is None else plan.runtime.room
            state = EngineResidency(Residency(room))
            setattr(core, _STATE, state)
        return state


def admit_loaded(core: Any, request: Any) -> None:
    """Note the steers of a request that was admitted, so that they stay until it has ended.

    Raises ``RejectedSteer`` if one of them has left since the frontend resolved the request.
    """
    loaded: Mapping[str, str] | None = argument(request.sampling_params, LOADED)
    if not loaded:
        return
    state = residency_of(core)
    with state.lock:
        gone = [n for n, key in loaded.items() if not _is_ready(state, key)]
        if gone:
            raise RejectedSteer(
                f"steer {gone[0]} was unloaded while the request was on its way; send it again"
            )
        for key in loaded.values():
            state.residency.use(key, time.monotonic())
        state.arriving[request.request_id] = tuple(loaded.values())


@contextmanager
def arriving(core: Any, request: Any) -> Iterator[None]:
    """``admit_loaded``; if the request fails within the context, it will not arrive."""
    admit_loaded(core, request)
    try:
        yield
    except BaseException:
        _has_arrived(core, request)
        raise


def with_arrival(
    original: Callable[..., Any], core: Any, request: Any, *args: Any, **kwargs: Any
) -> Any:
    """``EngineCore.add_request``, after which the scheduler has the request."""
    try:
        return original(core, request, *args, **kwargs)
    finally:
        _has_arrived(core, request)


def _has_arrived(core: Any, request: Any) -> None:
    state: EngineResidency | None = getattr(core, _STATE, None)
    if state is not None:
        state.arriving.pop(request.request_id, None)


def steer_read(core: Any, data: Mapping[str, Any], name: str, kept: Sequence[str]) -> Reply:
    """Place a steer and let the workers read it; ``kept`` are the keys that have a name."""
    planned = PlannedSteer.model_validate(data)
    plan, state, key = plan_of(core.vllm_config), residency_of(core), str(planned.key)
    assert plan is not None
    with state.lock:
        now = time.monotonic()
        if key in state.residency:
            state.residency.lease(key, now)
            return {"state": READING if key in state.being_read else READY}
        try:
            leaving = state.residency.add(
                key, planned, in_use={*kept, *_keys_in_use(core, state)}, now=now
            )
        except Refused as error:
            return {"error": str(error), "status": error.status}
        state.being_read[key] = now
    if leaving:
        for one in leaving:
            state.being_read.pop(one, None)
            plan.loaded.remove(one)
        core.collective_rpc("steer_forget", args=(leaving,))
    start = state.residency.place_of(key).start
    return _joined(core.collective_rpc("steer_read", args=(dict(data), name, start)))


def steer_write(core: Any, data: Mapping[str, Any]) -> Reply:
    """Write a steer to the device once all workers have read it; requests may use it then."""
    planned = PlannedSteer.model_validate(data)
    plan, state, key = plan_of(core.vllm_config), residency_of(core), str(planned.key)
    assert plan is not None
    if key not in state.residency:
        return {"error": f"steer {key} has no place any more", "status": CONFLICT}
    if key not in state.being_read:
        return {"state": READY}
    reply = _joined(core.collective_rpc("steer_ready", args=(key,)))
    if reply.get("state") != READY:
        return reply
    # Only now: a steer at heads is projected by all ranks together, and one alone would wait.
    reply = _joined(core.collective_rpc("steer_write", args=(key,)))
    if reply.get("state") == READY:
        plan.loaded.add(planned)
        with state.lock:
            state.being_read.pop(key, None)
            state.residency.lease(key, time.monotonic())
    return reply


def steer_forget(core: Any, key: str) -> Reply:
    """Take back a steer that another engine or rank could not load, unless requests use it."""
    plan, state = plan_of(core.vllm_config), residency_of(core)
    assert plan is not None
    with state.lock:
        if key not in state.being_read:  # this engine has it: it leaves when its place is needed
            if key in state.residency:
                state.residency.use(key, time.monotonic())
            return {"state": READY}
        state.residency.remove(key)
        del state.being_read[key]
    plan.loaded.remove(key)
    core.collective_rpc("steer_forget", args=([key],))
    return {"state": READY}


def steer_lease(core: Any, keys: Sequence[str]) -> Reply:
    """Keep steers for requests that are on their way; ``missing`` are those to load first."""
    state = residency_of(core)
    with state.lock:
        missing = [key for key in keys if not _is_ready(state, key)]
        for key in set(keys) - set(missing):
            state.residency.lease(key, time.monotonic())
    return {"state": READY, "missing": missing}


def steer_release(core: Any, keys: Sequence[str]) -> Reply:
    """Steers without a name from now on: their places are free as soon as no request uses them."""
    state = residency_of(core)
    with state.lock:
        for key in keys:
            if key in state.residency:
                state.residency.use(key, time.monotonic())
    return {"state": READY}


def steer_usage(core: Any) -> Reply:
    """How many live requests use each steer, by its name in the device tables."""
    plan, counts = plan_of(core.vllm_config), dict[str, int]()
    assert plan is not None
    for request in list(core.scheduler.requests.values()):
        params = request.sampling_params
        if params is None or argument(params, STREAM) is not None:
            continue
        doses = doses_of(params, plan)
        gates = [dose.gate for dose in doses if dose.gate is not None]
        entries = {dose.entry for dose in doses}.union(*(gate.entries for gate in gates))
        for entry in entries:
            counts[entry] = counts.get(entry, 0) + 1
    return {"state": READY, "in_use": counts}


def steer_room(core: Any, kept: Sequence[str]) -> Reply:
    """By region, the units that are in use or have a name, and all units."""
    state = residency_of(core)
    with state.lock:
        used = state.residency.used({*kept, *_keys_in_use(core, state)})
    return {"state": READY, "room": {region: list(pair) for region, pair in used.items()}}


def _is_ready(state: EngineResidency, key: str) -> bool:
    return key in state.residency and key not in state.being_read


def _keys_in_use(core: Any, state: EngineResidency) -> Collection[str]:
    """The keys of all requests that have not ended."""
    keys = {key for arriving in list(state.arriving.values()) for key in arriving}
    oldest = time.monotonic() - LONGEST_READING  # of a frontend that has died since
    keys |= {key for key, since in state.being_read.items() if since > oldest}
    for request in list(core.scheduler.requests.values()):
        keys.update(_loaded(request.sampling_params).values())
    return keys


def _loaded(params: Any) -> Mapping[str, str]:
    """The loaded steers of a request, or of a stream, which may end after its request."""
    stream = argument(params, STREAM) or {}
    return argument(params, LOADED) or stream.get("loaded") or {}


def _joined(replies: Sequence[Reply]) -> Reply:
    """The replies of all workers as one."""
    for reply in replies:
        if "error" in reply:
            return {"status": UNFIT, **reply}
    is_ready = all(reply["state"] == READY for reply in replies)
    return {"state": READY if is_ready else READING}
