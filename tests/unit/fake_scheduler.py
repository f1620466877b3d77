"""A scheduler that queues, allocates and preempts like vLLM's, and a worker that gets the step
plans.

KV blocks hold one token. As in vLLM, a waiting request without enough blocks for its whole text
ends the step's admissions, and a running one preempts the last to arrive.
"""

from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import RequestStatus

from vllm_steer.doses import Dose, Dynamic
from vllm_steer.serving.dynamic.request_group import RequestGroup
from vllm_steer.serving.dynamic.scheduler import StreamScheduler

JUNK = 999_999


class FakeRequest:
    """The part of vLLM's request that scheduling is about."""

    def __init__(self, request_id: str, prompt: int, max_tokens: int, arrival_time: float) -> None:
        self.request_id = request_id
        self.num_prompt_tokens = prompt
        self.max_tokens = max_tokens
        self.arrival_time = arrival_time
        self.status = RequestStatus.WAITING
        self.output_token_ids: list[int] = []
        self.num_computed_tokens = self.num_output_placeholders = self.num_in_flight_tokens = 0
        self.client_index = 0
        self.trace_headers = None
        self.grammar_is_ready = True
        self.prefill_stats: object | None = object()

    def take_prefill_stats(self) -> None:
        self.prefill_stats = None

    @property
    def num_output_tokens(self) -> int:
        return len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + len(self.output_token_ids)

    def append_output_token_ids(self, token: int) -> None:
        self.output_token_ids.append(token)

    def is_finished(self) -> bool:
        return RequestStatus.is_finished(self.status)

    def take_events(self) -> None:
        return None


class FakeScheduler:
    """``max_num_seqs`` requests, ``num_blocks`` blocks of one token, ``budget`` tokens a step."""

    def __init__(
        self, max_num_seqs: int = 16, num_blocks: int = 10_000, budget: int = 1_000
    ) -> None:
        self.max_num_running_reqs = max_num_seqs
        self.num_blocks, self.budget = num_blocks, budget
        self.pause_state = PauseState.UNPAUSED
        self.running: list[FakeRequest] = []
        self.waiting: list[FakeRequest] = []
        self.requests: dict[str, FakeRequest] = {}
        self.num_preempted = 0

    def add_request(self, request: FakeRequest) -> None:
        assert request.request_id not in self.requests, "duplicate request id"
        self.requests[request.request_id] = request
        self.waiting.append(request)

    def schedule(self) -> Any:
        scheduled: dict[str, int] = {}
        budget = 0 if self.pause_state == PauseState.PAUSED_ALL else self.budget
        preempted = False
        place = 0
        while place < len(self.running) and budget:
            request = self.running[place]
            candidates = (
                request.num_tokens + request.num_output_placeholders - request.num_computed_tokens
            )
            count = min(candidates, budget)
            assert count >= 0
            while count and self._free() < count:
                victim = self.running.pop()
                assert victim.request_id not in scheduled
                self._preempt_request(victim, 0.0)
                preempted = True
                if victim is request:
                    break
            if request.status != RequestStatus.RUNNING:
                break
            place += 1
            budget -= self._take(request, count, scheduled)
        if not preempted and self.pause_state == PauseState.UNPAUSED:
            self._admit(budget, scheduled)
        return SimpleNamespace(
            num_scheduled_tokens=scheduled, total_num_scheduled_tokens=sum(scheduled.values())
        )

    def _admit(self, budget: int, scheduled: dict[str, int]) -> None:
        skipped: list[FakeRequest] = []
        while self.waiting and budget and len(self.running) < self.max_num_running_reqs:
            request = self.waiting[0]
            if not self._may_be_admitted(request):
                skipped.append(self.waiting.pop(0))
                continue
            count = min(request.num_tokens, budget)
            if self._free() < request.num_tokens:  # room for the whole text, not for a part
                break
            assert request.num_output_placeholders == 0
            assert request.prefill_stats is None or not request.num_output_tokens
            self.running.append(self.waiting.pop(0))
            request.status = RequestStatus.RUNNING
            budget -= self._take(request, count, scheduled)
        self.waiting[:0] = skipped

    def _free(self) -> int:
        return self.num_blocks - sum(request.num_computed_tokens for request in self.running)

    @staticmethod
    def _take(request: FakeRequest, count: int, scheduled: dict[str, int]) -> int:
        if count:
            scheduled[request.request_id] = count
            request.num_computed_tokens += count
        return count

    def _may_be_admitted(self, request: FakeRequest) -> bool:
        raise NotImplementedError

    def _preempt_request(self, request: FakeRequest, timestamp: float) -> None:
        assert request.status == RequestStatus.RUNNING
        assert request not in self.running
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        self.num_preempted += 1
        self.waiting.insert(0, request)

    def update_from_output(self, scheduler_output: Any, runner_output: Any) -> Any:
        outputs: dict[int, EngineCoreOutputs] = {}
        for req_id in scheduler_output.num_scheduled_tokens:
            request = self.requests.get(req_id)
            if request is None:
                continue
            tokens = runner_output.sampled_token_ids[runner_output.req_id_to_index[req_id]]
            for token in tokens:
                request.append_output_token_ids(token)
                request.take_prefill_stats()
            if not tokens:
                continue
            if len(request.output_token_ids) >= request.max_tokens:
                request.status = RequestStatus.FINISHED_LENGTH_CAPPED
                self.running.remove(request)
                del self.requests[req_id]
            client = outputs.setdefault(request.client_index, EngineCoreOutputs(outputs=[]))
            reason = RequestStatus.get_finished_reason(request.status)
            client.outputs.append(EngineCoreOutput(req_id, list(tokens), finish_reason=reason))
        return outputs

    def finish_requests(self, request_ids: Any, finished_status: Any) -> list[Any]:
        ids: Iterable[str] = (request_ids,) if isinstance(request_ids, str) else request_ids
        ended = [
            self.requests.pop(i)
            for i in (list(self.requests) if ids is None else ids)
            if i in self.requests
        ]
        for request in ended:
            queue = self.running if request in self.running else self.waiting
            queue.remove(request)
            request.status = finished_status
        return ended

    def reset_prefix_cache(self) -> None:
        while self.running:
            self._preempt_request(self.running.pop(), 0.0)


class NewScheduler(FakeScheduler):
    """As in vLLM 0.31 and later: one method is called for every waiting request."""

    def _may_be_admitted(self, request: FakeRequest) -> bool:
        return self._handle_blocked_waiting_request(request)

    def _handle_blocked_waiting_request(self, request: FakeRequest) -> bool:
        if request.status == RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR:
            if not request.grammar_is_ready:
                return False
            request.status = RequestStatus.WAITING
        return True

    def _preempt_request(self, request: FakeRequest, timestamp: float) -> None:
        super()._preempt_request(request, timestamp)
        request.num_output_placeholders = 0


class OldScheduler(FakeScheduler):
    """As in vLLM 0.25.1: the method is called only for a request with a blocking status,
    placeholders outlive a preemption, and ``finish_requests`` returns pairs of id and client.
    """

    def _may_be_admitted(self, request: FakeRequest) -> bool:
        blocked = self._is_blocked_waiting_status(request.status)
        return not blocked or self._try_promote_blocked_waiting_request(request)

    @staticmethod
    def _is_blocked_waiting_status(status: RequestStatus) -> bool:
        return status == RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR

    def _try_promote_blocked_waiting_request(self, request: FakeRequest) -> bool:
        assert self._is_blocked_waiting_status(request.status), request.status
        if request.grammar_is_ready:
            request.status = RequestStatus.WAITING
        return request.grammar_is_ready

    def finish_requests(self, request_ids: Any, finished_status: Any) -> list[Any]:
        ended = super().finish_requests(request_ids, finished_status)
        return [(request.request_id, request.client_index) for request in ended]


class FakeEngine:
    """Steps of a scheduler and of a worker that knows the groups by itself.

    reads   the steps: by request the positions that it has read, ``(first, last)``
    reports by request the tokens, each with its report
    """

    kind: type[FakeScheduler] = NewScheduler

    def __init__(self, **limits: int) -> None:
        self.scheduler = self.kind(**limits)
        self.stream_scheduler = StreamScheduler(self.scheduler)
        self.reads: list[dict[str, tuple[int, int]]] = []
        self.reports: dict[str, list[tuple[int, Any]]] = {}
        self.ends: dict[str, tuple[Any, Any]] = {}
        self.during: Callable[[], None] | None = None
        self.answers = True
        self._groups: dict[str, RequestGroup] = {}
        self._here: dict[str, set[str]] = {}
        self._token = 0

    def plain(self, req_id: str, prompt: int = 3, max_tokens: int = 4) -> FakeRequest:
        """An ordinary request."""
        request = FakeRequest(req_id, prompt, max_tokens, arrival_time=len(self.reports))
        self.scheduler.add_request(request)
        self.reports[req_id] = []
        return request

    def dynamic(
        self,
        req_id: str,
        prompt: int = 3,
        max_tokens: int = 4,
        *,
        steps: Sequence[int | None] = (None,),
        at_head: int = 0,
    ) -> RequestGroup:
        """A request of dynamic doses: those of ``steps`` have probes, ``at_head`` more have none;
        without ``steps`` it is its own base.
        """
        main = FakeRequest(req_id, prompt, max_tokens, arrival_time=len(self.reports))
        doses = tuple(
            Dose(f"steer{i}", 2.0, dynamic=Dynamic()) for i in range(len(steps) + at_head)
        )
        lengths = dict(enumerate([*steps, *(at_head * [None])]))
        names = [f"{req_id}-base", *(f"{req_id}-probe-{i}" for i in range(len(steps)))]
        streams = {
            name: FakeRequest(name, prompt, max_tokens, main.arrival_time)
            for name in (names if steps else [])
        }
        group = RequestGroup(main, doses, lengths, streams, dict(enumerate(names[1:])))
        self._groups[req_id] = group
        self._here = {k: v for k, v in self._here.items() if k.split()[0] != req_id}
        self.reports[req_id] = []
        self.stream_scheduler.add(group)
        self.scheduler.add_request(main)
        return group

    def step(self) -> dict[str, int]:
        """One step; the tokens that each request has read in it."""
        scheduler = self.scheduler
        before = {r.request_id: r.num_computed_tokens for r in scheduler.running}
        output = scheduler.schedule()
        scheduled = output.num_scheduled_tokens
        requests = {r: scheduler.requests[r] for r in scheduled}
        assert len(scheduler.running) <= scheduler.max_num_running_reqs
        stream_step = getattr(output, "steer_streams", None)
        self.reads.append({})
        sampled = []
        for req_id, request in requests.items():
            first = before.get(req_id, 0)
            self.reads[-1][req_id] = (first, first + scheduled[req_id] - 1)
            whole = request.num_computed_tokens == request.num_tokens
            self._token += 1
            sampled.append([self._token] if whole else [])
        strengths = {} if stream_step is None else self._strengths(stream_step)
        if self.during is not None:
            self.during()
            self.during = None
        runner_output = SimpleNamespace(
            sampled_token_ids=sampled,
            req_id_to_index={req_id: row for row, req_id in enumerate(scheduled)},
            steer_strengths=strengths if self.answers else None,
        )
        self._report(scheduler.update_from_output(output, runner_output))
        return scheduled

    def run(self, limit: int = 400) -> None:
        """Steps until nothing is left."""
        for _ in range(limit):
            if not self.scheduler.requests:
                return
            self.step()
        raise AssertionError(f"still there: {sorted(self.scheduler.requests)}")

    def _strengths(self, stream_step: Any) -> dict[str, dict[int, float]]:
        """Strength 10 * step + dose, once base and all probes have read the same text."""
        strengths: dict[str, dict[int, float]] = {}
        for main, group in self._groups.items():
            step = group.main.num_output_tokens
            acting = [i for i, n in group.steps.items() if n is None or step < n]
            probes = {group.probes[i] for i in acting if i in group.probes}
            expected = {f"{main}-base", *probes} if probes or group.streams else {main}
            arrived = self._here.setdefault(f"{main} {step}", set())
            fresh = {
                r for r in stream_step.steps if r in expected and stream_step.steps[r] == step
            } - arrived
            arrived |= fresh
            if fresh and arrived == expected:
                strengths[main] = {i: 10.0 * step + i for i in acting}
        return strengths

    def _report(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        for output in (o for of_client in outputs.values() for o in of_client.outputs):
            for token in output.new_token_ids:
                self.reports[output.request_id].append((token, output.kv_transfer_params))
            if output.finish_reason is not None:
                assert output.request_id not in self.ends
                self.ends[output.request_id] = (output.finish_reason, output.stop_reason)
