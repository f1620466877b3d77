"""The streams of one request, as the scheduler's process sees them."""

from dataclasses import dataclass, field
from typing import Any

from vllm.v1.request import RequestStatus

from vllm_steer.doses import Dose

_HELD = -1  # one token less in sight, which leaves vLLM's scheduler nothing to schedule


@dataclass(eq=False)
class Group:
    """A dynamic request and its streams, vLLM's ``Request`` objects.

    main     the user's request
    doses    all of its doses
    steps    by index of a dynamic dose: how many generation steps it acts in; None for all
    streams  base and probes by id; empty where all doses act at the LM head, and once all that
             is dynamic has come to its end
    probes   id of the probe by index of its dose
    """

    main: Any
    doses: tuple[Dose, ...]
    steps: dict[int, int | None]
    streams: dict[str, Any]
    probes: dict[int, str]
    awaited: set[str] = field(default_factory=set)
    strengths: dict[int, float] | None = None
    num_tokens: int = 0
    started: bool = False
    parked: bool = False

    def __post_init__(self) -> None:
        self.awaited = set(self.streams)

    @property
    def members(self) -> list[Any]:
        """All of the group's requests, the main one last."""
        return [*self.streams.values(), self.main]

    @property
    def num_running(self) -> int:
        """Members that hold a seat and blocks."""
        return sum(member.status == RequestStatus.RUNNING for member in self.members)

    @property
    def wants_room(self) -> bool:
        """Whether a member waits for nothing but a seat and blocks."""
        waiting = (RequestStatus.WAITING, RequestStatus.PREEMPTED)
        return any(member.status in waiting and self.is_due(member) for member in self.members)

    @property
    def num_absent(self) -> int:
        """Members that will need a seat."""
        return len(self.members) - self.num_running if self.streams else 0

    def member(self, req_id: str) -> Any:
        """The group's request of that id."""
        return self.streams.get(req_id, self.main)

    def is_due(self, member: Any) -> bool:
        """Whether a member has something to read: the main one last, and none twice."""
        return not self.awaited if member is self.main else member.request_id in self.awaited

    def named_strengths(self) -> dict[str, float]:
        """By name of its steer, each dynamic dose's strength at the last token; 0 after its end."""
        now = self.strengths or {}
        return {self.doses[index].steer: now.get(index, 0.0) for index in self.steps}

    def wait_for_token(self, member: Any) -> int:
        """Hold a member whose step has been scheduled until its token is known.

        Asynchronous scheduling has counted the token already, to go on without it; that many
        tokens are returned, for ``expect_token``. A request without streams may go on.
        """
        if not self.streams:
            return 0
        ahead = int(member.num_output_placeholders)
        member.num_output_placeholders = 0
        return ahead

    def expect_token(self, ahead: int) -> None:
        """The main stream's token is about to be told: count again what was counted ahead."""
        if not getattr(self.main, "num_stale_output_tokens", 0):
            self.main.num_output_placeholders += ahead

    def release(self) -> None:
        """The strengths are there: the main stream may go on. One that has lost its blocks may be
        held still, for vLLM resets the count only from 0.27 on.
        """
        self.main.num_output_placeholders = 0

    def go_on(self) -> None:
        """The main stream has a new token: base and probes read it first."""
        if not self.streams:
            return
        token = self.main.output_token_ids[-1]
        for stream in self.streams.values():
            stream.append_output_token_ids(token)
        self.awaited = set(self.streams)
        if self.main.status == RequestStatus.RUNNING:
            self.main.num_output_placeholders = _HELD

    def take_exhausted(self) -> list[str]:
        """Take out the streams that nothing dynamic needs from the next token on."""
        over = {index for index, steps in self.steps.items() if self._is_over(steps)}
        ids = [self.probes[index] for index in over if self.probes.get(index) in self.streams]
        if len(over) == len(self.steps):
            ids = list(self.streams)
        for stream in ids:
            del self.streams[stream]
        return ids

    def _is_over(self, steps: int | None) -> bool:
        return steps is not None and self.num_tokens >= steps


def generation_step(request: Any) -> int:
    """How many tokens a request that has just been scheduled will have generated before the step's
    own: those that are known, and those that earlier steps are still computing.
    """
    return int(request.num_output_tokens) + max(int(request.num_output_placeholders) - 1, 0)
