"""How vLLM's scheduler schedules the streams of dynamic requests.

A generated token takes two steps: base and probes compute the last token and the worker computes
the strengths; then the main request computes it under these strengths and samples the next token.
In between a stream is not scheduled: base and probes, because their next token is the one that the
main request samples; the main request, because it is *blocked*. Everything else is vLLM's own:
queues, blocks, prefix cache, preemption.

A scheduler is wrapped, on the instance, when its engine gets its first dynamic request.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any

from vllm_steer.compat.patching import wrap
from vllm_steer.serving.dynamic.group_admission import (
    GroupAdmission,
    WaitingGate,
    missing_gate_names,
)
from vllm_steer.serving.dynamic.messages import STRENGTHS_KEY, StreamStep, StrengthsByRequest
from vllm_steer.serving.dynamic.request_group import RequestGroup, generation_step

logger = logging.getLogger("vllm.vllm_steer")

_WRAPPED_METHODS = ("schedule", "update_from_output", "finish_requests")
_REQUIRED_NAMES = (
    *_WRAPPED_METHODS,
    "_preempt_request",
    "requests",
    "running",
    "pause_state",
    "max_num_running_reqs",
)


def missing_scheduler_names(scheduler: Any) -> list[str]:
    """The names that ``StreamScheduler`` needs and this scheduler lacks."""
    missing = [name for name in _REQUIRED_NAMES if not hasattr(scheduler, name)]
    return missing + missing_gate_names(scheduler)


def stream_scheduler_of(scheduler: Any) -> "StreamScheduler":
    """The scheduler's ``StreamScheduler``, which wraps it at the first call."""
    stream_scheduler: StreamScheduler | None = getattr(scheduler, "vllm_steer_streams", None)
    if stream_scheduler is None:
        stream_scheduler = scheduler.vllm_steer_streams = StreamScheduler(scheduler)
    return stream_scheduler


class StreamScheduler:
    """The request groups of one scheduler, and the steps in flight that compute them."""

    def __init__(self, scheduler: Any) -> None:
        self.groups: dict[str, RequestGroup] = {}
        self._scheduler = scheduler
        self._group_of: dict[str, RequestGroup] = {}
        self._failed: dict[str, str] = {}
        self._in_flight: list[StreamStep] = []
        self._admission = GroupAdmission(scheduler, self.groups)
        self._gate = WaitingGate(scheduler, self._may_schedule)
        self._finish = scheduler.finish_requests
        wrappers: tuple[Callable[..., Any], ...] = (
            self._with_streams_in_step,
            self._with_strengths_received,
            self._with_groups_finished,
        )
        for name, around in zip(_WRAPPED_METHODS, wrappers, strict=True):
            wrap(scheduler, name, around)

    def add(self, group: RequestGroup) -> None:
        """Add a group's streams to the scheduler; the caller adds the request itself."""
        self.groups[group.main.request_id] = group
        for member in group.members:
            self._group_of[member.request_id] = group
        for stream in group.streams.values():
            # No client reads them, and vLLM before 0.27 fails on a preempted request that has them.
            stream.take_prefill_stats()
            self._scheduler.add_request(stream)

    def remove(self, main: str) -> None:
        """Remove a request's group and end its streams."""
        group = self.groups.pop(main, None)
        if group is None:
            return
        self._failed.pop(main, None)
        for member in group.members:
            self._group_of.pop(member.request_id, None)
        self._end(group.streams)
        group.streams = {}
        if not self.groups:
            self._in_flight = []  # no group waits for them, and a failed step is never updated
        self._admission.resume_next()

    def _with_streams_in_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._admission.begin_step()
        with self._gate.scheduling():
            output = original(*args, **kwargs)
        if self.groups:
            output.steer_streams = self._stream_step(output.num_scheduled_tokens)
            deferring = kwargs.get("throttle_prefills") or any(args)
            if output.total_num_scheduled_tokens:
                self._in_flight.append(output.steer_streams)
            elif not deferring and not self._in_flight:
                unschedulable = self._admission.resolve_deadlock()
                if unschedulable is not None:
                    self._fail(unschedulable, "its streams do not fit into the engine together")
        return output

    def _stream_step(self, scheduled: Iterable[str]) -> StreamStep:
        """What the requests of this step compute, for the workers."""
        step = StreamStep()
        for req_id in scheduled:
            group = self._group_of.get(req_id)
            if group is None:
                continue
            request = group.member(req_id)
            if req_id in group.streams and request.num_output_tokens:
                step.tokens[req_id] = (request.num_output_tokens, request.output_token_ids[-1])
            if request.num_computed_tokens >= request.num_tokens:
                step.steps[req_id] = generation_step(request)
                step.ahead[req_id] = group.block_until_token(request)
        return step

    def _with_strengths_received(
        self, original: Callable[..., Any], scheduler_output: Any, runner_output: Any
    ) -> Any:
        streams: StreamStep | None = getattr(scheduler_output, "steer_streams", None)
        if streams is None:
            return original(scheduler_output, runner_output)
        self._in_flight = [step for step in self._in_flight if step is not streams]
        computed: StrengthsByRequest = getattr(runner_output, "steer_strengths", None) or {}
        for req_id in streams.steps:
            group = self._group_of.get(req_id)
            if group is None:
                continue
            if req_id in group.streams:
                runner_output.sampled_token_ids[runner_output.req_id_to_index[req_id]] = []
            else:
                group.restore_placeholders(streams.ahead.get(req_id, 0))
        outputs = original(scheduler_output, runner_output)
        for main, strengths in computed.items():
            if main in self.groups:
                self.groups[main].strengths = strengths
        self._report(outputs)
        for req_id, step in streams.steps.items():
            group = self._group_of.get(req_id)
            if group is None:
                continue
            if req_id in group.streams:
                self._stream_computed(group, req_id, step)
            else:
                self._main_computed(group)
        self._send_failures(outputs)
        return outputs

    def _stream_computed(self, group: RequestGroup, stream: str, step: int) -> None:
        """A base or a probe has computed the text up to its last token."""
        if step != group.main.num_output_tokens or stream not in group.pending:
            return
        group.pending.discard(stream)
        if group.pending:
            return
        if group.strengths is None:
            self._fail(group, "its strengths were not computed")
            return
        group.resume_main()

    def _main_computed(self, group: RequestGroup) -> None:
        """The main request has sampled a token, which its streams compute next, or has finished."""
        main = group.main
        if main.is_finished():
            self._gate.forget(main)
            self.remove(main.request_id)
        elif main.num_output_tokens > group.num_tokens:
            group.num_tokens = main.num_output_tokens
            group.strengths = None
            finished = group.drop_finished_streams()
            if finished:
                self._end(finished)
                self._admission.resume_next()
            group.append_token()

    def _report(self, outputs: dict[int, Any]) -> None:
        """Attach the strengths of each new token to the output that goes to the frontend."""
        for by_client in outputs.values():
            for output in by_client.outputs:
                group = self.groups.get(output.request_id)
                if group is None:
                    if output.finish_reason is not None:
                        self._admission.resume_next()
                elif output.new_token_ids:
                    report = {STRENGTHS_KEY: {"strengths": group.named_strengths()}}
                    output.kv_transfer_params = (output.kv_transfer_params or {}) | report

    def _with_groups_finished(
        self, original: Callable[..., Any], request_ids: Any, finished_status: Any
    ) -> Any:
        """Ending a request ends its streams; ending a stream fails its request."""
        ended = original(request_ids, finished_status)
        for req_id in map(_id_of, ended):
            group = self._group_of.get(req_id)
            if group is None:
                self._admission.resume_next()
            elif req_id == group.main.request_id:
                self.remove(req_id)
            elif not group.main.is_finished():
                self._fail(group, f"its stream {req_id} ended before it")
        return ended

    def _end(self, streams: Iterable[str]) -> None:
        """End base and probe streams in any state."""
        from vllm.v1.request import RequestStatus

        ids = list(streams)
        for stream in ids:
            self._group_of.pop(stream, None)
        if ids:
            self._finish(ids, RequestStatus.FINISHED_ABORTED)

    def _fail(self, group: RequestGroup, why: str) -> None:
        self._failed[group.main.request_id] = why

    def _send_failures(self, outputs: dict[int, Any]) -> None:
        """End the failed requests with an error that their clients receive."""
        if not self._failed:
            return
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
        from vllm.v1.request import RequestStatus

        while self._failed:
            main, why = self._failed.popitem()
            group = self.groups.get(main)
            if group is None:
                continue
            message = f"vllm-steer: request {main} with dynamic strength cannot go on: {why}"
            logger.error("%s", message)
            request = group.main
            self._finish(main, RequestStatus.FINISHED_ERROR)
            self.remove(main)
            client = outputs.setdefault(request.client_index, EngineCoreOutputs(outputs=[]))
            client.outputs.append(
                EngineCoreOutput(
                    request_id=main,
                    new_token_ids=[],
                    finish_reason=FinishReason.ERROR,
                    stop_reason=message,
                    events=request.take_events(),
                    trace_headers=request.trace_headers,
                )
            )

    def _may_schedule(self, is_ready: Callable[[Any], bool], request: Any) -> bool:
        """Whether a waiting request may be scheduled: not if a step from before its preemption is
        still in flight (asynchronous scheduling).
        """
        group = self._group_of.get(request.request_id)
        if group is not None and any(request.request_id in step.steps for step in self._in_flight):
            return False
        return self._admission.may_schedule(group, request) and is_ready(request)


def _id_of(ended: Any) -> str:
    """The id of a finished request; vLLM 0.25 returns the id and the client index instead."""
    return str(ended[0] if isinstance(ended, tuple) else ended.request_id)
