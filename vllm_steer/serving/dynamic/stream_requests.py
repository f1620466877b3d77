"""Makes the streams of a request in the engine core, and adds them together with it."""

import copy
from collections.abc import Callable
from typing import Any

from vllm_steer.compat.patching import version_advice
from vllm_steer.doses import Dose
from vllm_steer.plan import SteerPlan
from vllm_steer.serving.cache_key import steered_salt
from vllm_steer.serving.dynamic.request_group import RequestGroup
from vllm_steer.serving.dynamic.scheduler import missing_scheduler_names, stream_scheduler_of
from vllm_steer.serving.dynamic.streams import needs_streams, probed_doses
from vllm_steer.serving.request_args import (
    STREAM,
    RejectedSteer,
    StreamRequest,
    doses_of,
    loaded_argument,
    steer_argument,
)


def preprocess_dynamic(
    original: Callable[..., Any],
    core: Any,
    request: Any,
    salt: str | None,
    doses: tuple[Dose, ...],
    plan: SteerPlan,
) -> Any:
    """``EngineCore.preprocess_add_request`` for a dynamic request and its streams.

    ``salt`` is the user's own, from before the request got its key. Raises
    ``RejectedSteer`` where the scheduler cannot serve streams.
    """
    _check_scheduler(core.scheduler)
    streams = _make_streams(request, salt, doses, plan) if needs_streams(doses, plan) else []
    preprocessed = original(core, request)
    streams = [original(core, stream)[0] for stream in streams]
    preprocessed[0].steer_request_group = _make_group(preprocessed[0], doses, streams, plan)
    return preprocessed


def add_with_streams(
    original: Callable[..., Any], core: Any, request: Any, *args: Any, **kwargs: Any
) -> Any:
    """``EngineCore.add_request`` that also adds the request's streams."""
    group: RequestGroup | None = getattr(request, "steer_request_group", None)
    if group is None:
        return original(core, request, *args, **kwargs)
    scheduler = stream_scheduler_of(core.scheduler)
    scheduler.add(group)
    try:
        return original(core, request, *args, **kwargs)
    except BaseException:
        scheduler.remove(request.request_id)
        raise


def _check_scheduler(scheduler: Any) -> None:
    """Raise ``RejectedSteer`` if the scheduler lacks a name that ``StreamScheduler`` needs."""
    if missing := missing_scheduler_names(scheduler):
        raise RejectedSteer(
            f"dynamic strength is not available: this engine's scheduler has no "
            f"{', '.join(missing)}; {version_advice()}, or give the steers fixed strengths"
        )


def _make_streams(request: Any, salt: str | None, doses: Any, plan: SteerPlan) -> list[Any]:
    """The base's request and one per probed dose, each with the user's prompt."""
    from vllm import SamplingParams

    params = request.sampling_params
    stream_requests = []
    for dose in (None, *probed_doses(doses, plan)):
        stream = StreamRequest(
            request.request_id, steer_argument(params), dose, loaded_argument(params)
        )
        stream_request = copy.copy(request)
        role = "base" if dose is None else f"probe-{dose}"
        stream_request.request_id = f"{request.request_id}-{role}"
        stream_request.sampling_params = SamplingParams(
            temperature=0.0,
            max_tokens=params.max_tokens,
            ignore_eos=True,
            detokenize=False,
            skip_reading_prefix_cache=params.skip_reading_prefix_cache,
            extra_args={STREAM: stream.to_args()},
        )
        stream_request.cache_salt = salt  # a base shares blocks with unsteered requests
        stream_doses = doses_of(stream_request.sampling_params, plan)
        stream_request.cache_salt = steered_salt(stream_request, stream_doses, plan)
        stream_requests.append(stream_request)
    return stream_requests


def _make_group(main: Any, doses: Any, streams: list[Any], plan: SteerPlan) -> RequestGroup:
    steps = {i: plan.steer_of(d).steps for i, d in enumerate(doses) if d.dynamic}
    probes = dict(zip(probed_doses(doses, plan), (s.request_id for s in streams[1:]), strict=True))
    return RequestGroup(main, doses, steps, {s.request_id: s for s in streams}, probes)
