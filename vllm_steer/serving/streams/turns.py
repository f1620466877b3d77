"""The turns that the streams of dynamic requests take in vLLM's scheduler.

A token takes two steps: base and probes read it, the worker works out the strengths, then the main
stream reads it under them and samples the next one. In between a stream has nothing to do: base
and probes because what they sample is dropped and their next token is not known yet; the main one
because it is *held*. Everything else is vLLM's own: queues, blocks, prefix cache, preemption.

A scheduler is wrapped, on the instance, when its engine gets its first dynamic request.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any

from vllm_steer.compat.patching import wrap
from vllm_steer.serving.streams.gate import Gate, missing_gate
from vllm_steer.serving.streams.group import Group, generation_step
from vllm_steer.serving.streams.message import REPORT, Answer, Turn
from vllm_steer.serving.streams.room import Room

logger = logging.getLogger("vllm.vllm_steer")

_WRAPPED = ("schedule", "update_from_output", "finish_requests")
_NEEDED = (
    *_WRAPPED,
    "_preempt_request",
    "requests",
    "running",
    "pause_state",
    "max_num_running_reqs",
)


def missing_names(scheduler: Any) -> list[str]:
    """What turns need of a scheduler and this one has not."""
    return [name for name in _NEEDED if not hasattr(scheduler, name)] + missing_gate(scheduler)


def turns_of(scheduler: Any) -> "Turns":
    """The scheduler's turns, taken over at the first call."""
    turns: Turns | None = getattr(scheduler, "vllm_steer_turns", None)
    if turns is None:
        turns = scheduler.vllm_steer_turns = Turns(scheduler)
    return turns


class Turns:
    """Who may go next among the streams of one scheduler."""

    def __init__(self, scheduler: Any) -> None:
        self.groups: dict[str, Group] = {}
        self._scheduler = scheduler
        self._group_of: dict[str, Group] = {}
        self._failed: dict[str, str] = {}
        self._under_way: list[Turn] = []
        self._room = Room(scheduler, self.groups)
        self._gate = Gate(scheduler, self._may_go)
        self._finish = scheduler.finish_requests
        wrappers: tuple[Callable[..., Any], ...] = (self._schedule, self._update, self._finished)
        for name, around in zip(_WRAPPED, wrappers, strict=True):
            wrap(scheduler, name, around)

    def enter(self, group: Group) -> None:
        """Take a request's streams in; the request itself follows."""
        self.groups[group.main.request_id] = group
        for member in group.members:
            self._group_of[member.request_id] = group
        for stream in group.streams.values():
            # No client asks for them, and vLLM before 0.27 fails on a preempted request with them.
            stream.take_prefill_stats()
            self._scheduler.add_request(stream)

    def leave(self, main: str) -> None:
        """Let a request go, with all of its streams."""
        group = self.groups.pop(main, None)
        if group is None:
            return
        self._failed.pop(main, None)
        for member in group.members:
            self._group_of.pop(member.request_id, None)
        self._end(group.streams)
        group.streams = {}
        if not self.groups:
            self._under_way = []  # nobody waits for them, and a step that failed is never updated
        self._room.admit_one()

    def _schedule(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._room.new_step()
        with self._gate.scheduling():
            output = original(*args, **kwargs)
        if self.groups:
            output.steer_turn = self._turn(output.num_scheduled_tokens)
            deferring = kwargs.get("throttle_prefills") or any(args)
            if output.total_num_scheduled_tokens:
                self._under_way.append(output.steer_turn)
            elif not deferring and not self._under_way:
                stuck = self._room.make()
                if stuck is not None:
                    self._fail(stuck, "its streams do not fit into the engine together")
        return output

    def _turn(self, scheduled: Iterable[str]) -> Turn:
        """What the step's streams are to the workers."""
        turn = Turn()
        for req_id in scheduled:
            group = self._group_of.get(req_id)
            if group is None:
                continue
            request = group.member(req_id)
            if req_id in group.streams and request.num_output_tokens:
                turn.tokens[req_id] = (request.num_output_tokens, request.output_token_ids[-1])
            if request.num_computed_tokens >= request.num_tokens:
                turn.steps[req_id] = generation_step(request)
                turn.ahead[req_id] = group.wait_for_token(request)
        return turn

    def _update(
        self, original: Callable[..., Any], scheduler_output: Any, runner_output: Any
    ) -> Any:
        turn: Turn | None = getattr(scheduler_output, "steer_turn", None)
        if turn is None:
            return original(scheduler_output, runner_output)
        self._under_way = [each for each in self._under_way if each is not turn]
        answer: Answer = getattr(runner_output, "steer_strengths", None) or {}
        for req_id in turn.steps:
            group = self._group_of.get(req_id)
            if group is None:
                continue
            if req_id in group.streams:
                runner_output.sampled_token_ids[runner_output.req_id_to_index[req_id]] = []
            else:
                group.expect_token(turn.ahead.get(req_id, 0))
        outputs = original(scheduler_output, runner_output)
        for main, strengths in answer.items():
            if main in self.groups:
                self.groups[main].strengths = strengths
        self._report(outputs)
        for req_id, step in turn.steps.items():
            group = self._group_of.get(req_id)
            if group is None:
                continue
            if req_id in group.streams:
                self._arrived(group, req_id, step)
            else:
                self._answered(group)
        self._send_failures(outputs)
        return outputs

    def _arrived(self, group: Group, stream: str, step: int) -> None:
        """A base or a probe has read the text up to its last token."""
        if step != group.main.num_output_tokens or stream not in group.awaited:
            return
        group.awaited.discard(stream)
        if group.awaited:
            return
        if group.strengths is None:
            self._fail(group, "its strengths were not worked out")
            return
        group.release()

    def _answered(self, group: Group) -> None:
        """The main stream has had its turn: with a token the others go on, at its end they end."""
        main = group.main
        if main.is_finished():
            self._gate.forget(main)
            self.leave(main.request_id)
        elif main.num_output_tokens > group.num_tokens:
            group.num_tokens = main.num_output_tokens
            group.strengths = None
            exhausted = group.take_exhausted()
            if exhausted:
                self._end(exhausted)
                self._room.admit_one()
            group.go_on()

    def _report(self, outputs: dict[int, Any]) -> None:
        """The strengths of each new token, on its way to the frontend."""
        for by_client in outputs.values():
            for output in by_client.outputs:
                group = self.groups.get(output.request_id)
                if group is None:
                    if output.finish_reason is not None:
                        self._room.admit_one()
                elif output.new_token_ids:
                    told = {REPORT: {"strengths": group.named_strengths()}}
                    output.kv_transfer_params = (output.kv_transfer_params or {}) | told

    def _finished(
        self, original: Callable[..., Any], request_ids: Any, finished_status: Any
    ) -> Any:
        """A request that is ended ends its streams; a stream that is ended takes its request."""
        ended = original(request_ids, finished_status)
        for req_id in map(_id_of, ended):
            group = self._group_of.get(req_id)
            if group is None:
                self._room.admit_one()
            elif req_id == group.main.request_id:
                self.leave(req_id)
            elif not group.main.is_finished():
                self._fail(group, f"its stream {req_id} ended before it")
        return ended

    def _end(self, streams: Iterable[str]) -> None:
        """End base and probe streams, whatever they are doing."""
        from vllm.v1.request import RequestStatus

        ids = list(streams)
        for stream in ids:
            self._group_of.pop(stream, None)
        if ids:
            self._finish(ids, RequestStatus.FINISHED_ABORTED)

    def _fail(self, group: Group, why: str) -> None:
        self._failed[group.main.request_id] = why

    def _send_failures(self, outputs: dict[int, Any]) -> None:
        """End the requests that cannot go on, and tell their clients."""
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
            self.leave(main)
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

    def _may_go(self, is_ready: Callable[[Any], bool], request: Any) -> bool:
        """Whether a waiting request may be scheduled: no member whose last step, from before it
        lost its blocks, is still being computed (asynchronous scheduling).
        """
        group = self._group_of.get(request.request_id)
        if group is not None and any(request.request_id in turn.steps for turn in self._under_way):
            return False
        return self._room.is_open(group, request) and is_ready(request)


def _id_of(ended: Any) -> str:
    """The id of a request that has been ended; vLLM 0.25 tells the id and the client instead."""
    return str(ended[0] if isinstance(ended, tuple) else ended.request_id)
