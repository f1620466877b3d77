"""From a user's request to the requests that serve it: base and probes, made in the engine core."""

import copy
from collections.abc import Callable
from typing import Any

from vllm_steer.compat.patching import advice
from vllm_steer.doses import Dose
from vllm_steer.plan import SteerPlan
from vllm_steer.serving.cache_key import steered_salt
from vllm_steer.serving.request_args import STREAM, RejectedSteer, Stream, asked_steer, doses_of
from vllm_steer.serving.streams.group import Group
from vllm_steer.serving.streams.stream import needs_streams, probed_doses
from vllm_steer.serving.streams.turns import missing_names, turns_of


def preprocess_dynamic(
    original: Callable[..., Any],
    core: Any,
    request: Any,
    salt: str | None,
    doses: tuple[Dose, ...],
    plan: SteerPlan,
) -> Any:
    """``EngineCore.preprocess_add_request`` for a dynamic request and its streams.

    ``salt`` is the user's own, which the streams have before they are keyed. Raises
    ``RejectedSteer`` where the scheduler cannot serve streams.
    """
    _check_scheduler(core.scheduler)
    made = _streams(request, salt, doses, plan) if needs_streams(doses, plan) else []
    preprocessed = original(core, request)
    streams = [original(core, stream)[0] for stream in made]
    preprocessed[0].steer_group = _group(preprocessed[0], doses, streams, plan)
    return preprocessed


def add_with_streams(
    original: Callable[..., Any], core: Any, request: Any, *args: Any, **kwargs: Any
) -> Any:
    """``EngineCore.add_request``: the streams enter with their request."""
    group: Group | None = getattr(request, "steer_group", None)
    if group is None:
        return original(core, request, *args, **kwargs)
    turns = turns_of(core.scheduler)
    turns.enter(group)
    try:
        return original(core, request, *args, **kwargs)
    except BaseException:
        turns.leave(request.request_id)
        raise


def _check_scheduler(scheduler: Any) -> None:
    """Raise ``RejectedSteer`` where streams cannot take turns."""
    if missing := missing_names(scheduler):
        raise RejectedSteer(
            f"dynamic strength is not available: this engine's scheduler has no "
            f"{', '.join(missing)}; {advice()}, or give the steers fixed strengths"
        )


def _streams(request: Any, salt: str | None, doses: Any, plan: SteerPlan) -> list[Any]:
    """The base's request and one per dose that is probed, all of the user's own prompt."""
    from vllm import SamplingParams

    params = request.sampling_params
    made = []
    for dose in (None, *probed_doses(doses, plan)):
        stream = Stream(request.request_id, asked_steer(params), dose)
        own = copy.copy(request)
        own.request_id = f"{request.request_id}-{'base' if dose is None else f'probe-{dose}'}"
        own.sampling_params = SamplingParams(
            temperature=0.0,
            max_tokens=params.max_tokens,
            ignore_eos=True,
            detokenize=False,
            skip_reading_prefix_cache=params.skip_reading_prefix_cache,
            extra_args={STREAM: stream.to_args()},
        )
        own.cache_salt = salt  # the base shares its blocks with everybody, probes with their like
        own.cache_salt = steered_salt(own, doses_of(own.sampling_params, plan), plan)
        made.append(own)
    return made


def _group(main: Any, doses: Any, streams: list[Any], plan: SteerPlan) -> Group:
    steps = {i: plan.steers[d.steer].steps for i, d in enumerate(doses) if d.dynamic}
    probes = dict(zip(probed_doses(doses, plan), (s.request_id for s in streams[1:]), strict=True))
    return Group(main, doses, steps, {s.request_id: s for s in streams}, probes)
