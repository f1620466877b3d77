"""From a step's logits to the strengths of the next token, on the device.

The rows of base and probe streams are rows of the batch; the probe of a dose at the LM head is a
row more of the same product, made from its base's hidden state. A request whose base and probes
come in different steps keeps the rows that came first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from vllm_steer.dynamic import strength_of_rows
from vllm_steer.kernels.upload import upload
from vllm_steer.serving.streams.message import Answer, Turn
from vllm_steer.serving.streams.requests import DynamicRequest, DynamicRequests, Role


@dataclass(frozen=True)
class HeadProbe:
    """A row more of the head's product: the probe of one dose on ``row``'s hidden state."""

    row: int
    steer: str
    strength: float


@dataclass(eq=False)
class Arrival:
    """The logits rows that a step has for one request, by role."""

    main: str
    request: DynamicRequest
    step: int
    rows: dict[Role, int] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether base and all probes of the step are there."""
        wanted = {None, *self.request.active(self.step)}
        return wanted <= self.rows.keys() | self.request.kept.keys()


@dataclass(eq=False)
class StepStrengths:
    """What one step has to do with its logits.

    probes     the rows that the head's product has more, after the R of the batch
    arrivals   by request
    alone      rows of requests that are their own base, to be computed again under their strengths
    steps      by id of a user's request with dynamic doses at the head that reads its last token:
               the generation step
    """

    probes: list[HeadProbe]
    arrivals: list[Arrival]
    alone: list[int]
    steps: dict[str, int]


class Strengths:
    """Works out strengths and keeps them: in the pool, and for the scheduler's process."""

    def __init__(self, requests: DynamicRequests) -> None:
        self.requests = requests
        self._worked_out: list[tuple[str, int]] = []
        self._on_host: list[HostCopy] = []

    def plan(self, turn: Turn, req_ids: Sequence[str]) -> StepStrengths | None:
        """What a step with these rows has to do; None if nothing dynamic meets the head."""
        row_of = {req_id: row for row, req_id in enumerate(req_ids)}
        arrivals: dict[str, Arrival] = {}
        steps: dict[str, int] = {}
        for req_id, step in turn.steps.items():
            role = self.requests.role(req_id)
            own = self.requests.get(req_id)
            if own is not None and own.at_head:
                steps[req_id] = step
            if role is None:
                continue
            main, request, dose = role
            # An earlier step comes again where vLLM has dropped the tokens that came after it.
            if step != request.known:
                arrival = arrivals.setdefault(main, Arrival(main, request, step))
                arrival.rows[dose] = row_of[req_id]
        if not arrivals and not steps:
            return None
        probes: list[HeadProbe] = []
        for arrival in arrivals.values():
            self._add_probes(arrival, probes, len(row_of))
        alone = [a.rows[None] for a in arrivals.values() if a.request.alone]
        return StepStrengths(probes, list(arrivals.values()), alone, steps)

    @staticmethod
    def _add_probes(arrival: Arrival, probes: list[HeadProbe], num_rows: int) -> None:
        """The probes that the arrival's base row stands for as well: of doses at the head."""
        request = arrival.request
        if None not in arrival.rows:
            return
        for index in request.active(arrival.step):
            if index not in request.probed:
                dose = request.doses[index]
                arrival.rows[index] = num_rows + len(probes)
                probes.append(HeadProbe(arrival.rows[None], dose.steer, dose.strength))

    def work_out(self, step: StepStrengths, logits: torch.Tensor) -> None:
        """Write the strengths of all requests whose rows are complete; keep the other rows."""
        complete = [arrival for arrival in step.arrivals if arrival.is_complete]
        if complete:
            self._write(complete, logits)
        for arrival in step.arrivals:
            if arrival.request.known < arrival.step:
                for role, row in arrival.rows.items():
                    arrival.request.kept[role] = logits[row].clone()

    def _write(self, arrivals: Sequence[Arrival], logits: torch.Tensor) -> None:
        kept: list[torch.Tensor] = []
        base_rows: list[int] = []
        base_of: list[int] = []
        probe_rows: list[int] = []
        places: list[int] = []
        numbers: list[tuple[float, float, float]] = []
        authors: list[bool] = []
        for arrival in arrivals:
            request = arrival.request
            for role, row in request.kept.items():
                arrival.rows.setdefault(role, logits.shape[0] + len(kept))
                kept.append(row)
            base_rows.append(arrival.rows[None])
            for index in request.active(arrival.step):
                dose = request.doses[index]
                assert dose.dynamic is not None
                base_of.append(len(base_rows) - 1)
                probe_rows.append(arrival.rows[index])
                places.append(request.starts[index] + arrival.step)
                numbers.append((dose.dynamic.top_p, abs(dose.strength), np.sign(dose.strength)))
                authors.append(dose.dynamic.kl == "authors")
                self._worked_out.append((arrival.main, index))
            request.known = arrival.step
            request.kept = {}
        if not places:
            return
        if kept:
            logits = torch.cat([logits, torch.stack(kept)])
        device = logits.device
        probe_of = range(len(base_rows), len(base_rows) + len(probe_rows))
        rows, (bases, probes, where), (top_p, maximum, sign), divided = upload(
            [
                np.array([*base_rows, *probe_rows], dtype=np.int64),
                np.array([base_of, probe_of, places], dtype=np.int64),
                np.array(numbers, dtype=np.float32).T,
                np.array(authors),
            ],
            device,
        )
        strengths, _ = strength_of_rows(
            logits.index_select(0, rows), bases, probes, top_p=top_p, maximum=maximum, kl=divided
        )
        strengths = (strengths * sign).float()
        self.requests.pool.values.index_copy_(0, where, strengths)
        self._on_host.append(HostCopy.of(strengths))

    def take_answer(self) -> "WorkedOut | None":
        """The strengths worked out since the last answer, on their way to the host."""
        answer = WorkedOut(self._worked_out, self._on_host) if self._worked_out else None
        self._worked_out, self._on_host = [], []
        return answer


@dataclass(frozen=True)
class HostCopy:
    """Numbers on their way to the host."""

    values: torch.Tensor
    event: torch.cuda.Event | None

    @classmethod
    def of(cls, values: torch.Tensor) -> "HostCopy":
        """Start the copy; it is not waited for."""
        if values.device.type == "cpu":
            return cls(values, None)
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return cls(host, event)

    def numbers(self) -> list[float]:
        """The numbers, once they are there."""
        if self.event is not None:
            self.event.synchronize()
        numbers: list[float] = self.values.tolist()
        return numbers


@dataclass(frozen=True)
class WorkedOut:
    """Whose strengths a step has worked out, by request and dose, and their numbers."""

    whose: list[tuple[str, int]]
    copies: list[HostCopy]

    def read(self) -> Answer:
        """The strengths; called when the step's tokens, which are younger, are on the host."""
        numbers = [number for copy in self.copies for number in copy.numbers()]
        answer: Answer = {}
        for (main, index), value in zip(self.whose, numbers, strict=True):
            answer.setdefault(main, {})[index] = value
        return answer
