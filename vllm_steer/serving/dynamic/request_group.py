"""A request and its streams in the scheduler's process."""

from dataclasses import dataclass, field
from typing import Any

from vllm.v1.request import RequestStatus

from vllm_steer.doses import Dose

_BLOCKED = -1
"""Number of output placeholders with which vLLM's scheduler finds no token to schedule."""


@dataclass(eq=False)
class RequestGroup:
    """A request with dynamic strength and its streams, as vLLM's ``Request`` objects.

    main       the user's request
    doses      all of its doses
    steps      by index of a dynamic dose: in how many generation steps it acts; None for all
    streams    base and probes by id; empty if all doses act at the LM head, and once no dynamic
               dose acts any more
    probes     id of the probe by index of its dose
    pending    ids of the streams that have yet to compute the last token
    strengths  of the next token by index of a dose, once they have been computed
    started    whether slots are reserved for all members
    suspended  whether the group was preempted as a whole and has to wait
    """

    main: Any
    doses: tuple[Dose, ...]
    steps: dict[int, int | None]
    streams: dict[str, Any]
    probes: dict[int, str]
    pending: set[str] = field(default_factory=set)
    strengths: dict[int, float] | None = None
    num_tokens: int = 0
    started: bool = False
    suspended: bool = False

    def __post_init__(self) -> None:
        self.pending = set(self.streams)

    @property
    def members(self) -> list[Any]:
        """All requests of the group, the main one last."""
        return [*self.streams.values(), self.main]

    @property
    def num_running(self) -> int:
        """Members that have a slot and blocks."""
        return sum(member.status == RequestStatus.RUNNING for member in self.members)

    @property
    def needs_blocks(self) -> bool:
        """Whether a member has tokens to compute and waits for a slot and blocks only."""
        waiting_statuses = (RequestStatus.WAITING, RequestStatus.PREEMPTED)
        return any(
            member.status in waiting_statuses and self.is_pending(member) for member in self.members
        )

    @property
    def num_not_running(self) -> int:
        """Members that will need a slot."""
        return len(self.members) - self.num_running if self.streams else 0

    def member(self, req_id: str) -> Any:
        """The member with this id."""
        return self.streams.get(req_id, self.main)

    def is_pending(self, member: Any) -> bool:
        """Whether a member still has to compute the last token; the main request runs after base
        and probes.
        """
        return not self.pending if member is self.main else member.request_id in self.pending

    def named_strengths(self) -> dict[str, float]:
        """By name of its steer, each dynamic dose's strength at the last token; 0 once it no longer
        acts.
        """
        now = self.strengths or {}
        return {self.doses[index].steer: now.get(index, 0.0) for index in self.steps}

    def block_until_token(self, member: Any) -> int:
        """Keep a scheduled member out of the next steps until its token is known.

        Asynchronous scheduling has counted that token already. The number of tokens counted is
        returned, for ``restore_placeholders``. A request without streams is not blocked.
        """
        if not self.streams:
            return 0
        ahead = int(member.num_output_placeholders)
        member.num_output_placeholders = 0
        return ahead

    def restore_placeholders(self, ahead: int) -> None:
        """Count again what was counted ahead, before vLLM receives the main request's token."""
        if not getattr(self.main, "num_stale_output_tokens", 0):
            self.main.num_output_placeholders += ahead

    def resume_main(self) -> None:
        """The strengths are known: the main request may be scheduled. A preempted one may still be
        blocked, for vLLM resets the count from 0.27 on only.
        """
        self.main.num_output_placeholders = 0

    def append_token(self) -> None:
        """The main request has a new token, which base and probes compute first."""
        if not self.streams:
            return
        token = self.main.output_token_ids[-1]
        for stream in self.streams.values():
            stream.append_output_token_ids(token)
        self.pending = set(self.streams)
        if self.main.status == RequestStatus.RUNNING:
            self.main.num_output_placeholders = _BLOCKED

    def drop_finished_streams(self) -> list[str]:
        """Remove the streams that no dynamic dose needs from the next token on; their ids."""
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
    """How many tokens a request that has just been scheduled will have generated before this step's
    token: the known ones, and those that earlier steps in flight still sample.
    """
    return int(request.num_output_tokens) + max(int(request.num_output_placeholders) - 1, 0)
