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
from vllm_steer.kernels.divergence import DivergenceForm
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


_DOSES_AT_ONCE = 64
"""Bounds the rows of logits that are copied side by side: two per dose."""


@dataclass(frozen=True, eq=False)
class _Job:
    """A dose whose strength a step can work out: where its base and probe are.

    A row is a number, of the batch's logits or the probes' after them, or the logits ``[V]``
    themselves where an earlier step left them.
    """

    arrival: Arrival
    index: int
    base: int | torch.Tensor
    probe: int | torch.Tensor


class Strengths:
    """Works out strengths and keeps them: in the pool, and for the scheduler's process."""

    def __init__(self, requests: DynamicRequests, form: DivergenceForm | None = None) -> None:
        self.requests = requests
        self._form = form
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

    def work_out(
        self, step: StepStrengths, batch: torch.Tensor, logits: torch.Tensor, first: int
    ) -> None:
        """Write the strengths of the doses whose probes have their logits in this part, and keep
        the part's rows of requests that still wait for others.

        ``logits`` are the rows from ``first`` on, ``batch`` those from 0 on, at least the batch's.
        What earlier steps left goes with the part that begins at 0.
        """
        rows = range(first, first + logits.shape[0])
        jobs = [
            job
            for arrival in step.arrivals
            if arrival.is_complete
            for job in _jobs(arrival)
            if (job.probe in rows if isinstance(job.probe, int) else first == 0)
        ]
        for start in range(0, len(jobs), _DOSES_AT_ONCE):
            self._write(jobs[start : start + _DOSES_AT_ONCE], batch, logits, first)
        for arrival in step.arrivals:
            if not arrival.is_complete:
                for role, row in arrival.rows.items():
                    if row in rows:
                        arrival.request.kept[role] = logits[row - first].clone()

    def settle(self, step: StepStrengths) -> None:
        """Every part has been worked out: note what is known, let go of what was kept for it."""
        for arrival in step.arrivals:
            if arrival.is_complete:
                arrival.request.known, arrival.request.kept = arrival.step, {}

    def _write(
        self, jobs: Sequence[_Job], batch: torch.Tensor, logits: torch.Tensor, first: int
    ) -> None:
        """The strengths of some doses into the pool, and on their way to the host."""
        kept = {
            id(row): row
            for job in jobs
            for row in (job.base, job.probe)
            if not isinstance(row, int)
        }
        bases = sorted({job.base for job in jobs if isinstance(job.base, int)})
        probes = sorted({job.probe for job in jobs if isinstance(job.probe, int)})
        places = {
            key: place
            for place, key in enumerate(
                [*(("base", row) for row in bases), *(("probe", row) for row in probes), *kept]
            )
        }
        table, numbers, authors = [], [], []
        for job in jobs:
            request = job.arrival.request
            dose = request.doses[job.index]
            assert dose.dynamic is not None
            base = ("base", job.base) if isinstance(job.base, int) else id(job.base)
            probe = ("probe", job.probe) if isinstance(job.probe, int) else id(job.probe)
            where = request.starts[job.index] + job.arrival.step
            table.append((places[base], places[probe], where))
            numbers.append((dose.dynamic.top_p, abs(dose.strength), np.sign(dose.strength)))
            authors.append(dose.dynamic.kl == "authors")
            self._worked_out.append((job.arrival.main, job.index))
        bases_at, probes_at, (base_of, probe_of, pool_at), (top_p, maximum, sign), divided = upload(
            [
                np.array(bases, dtype=np.int64),
                np.array(probes, dtype=np.int64) - first,
                np.array(table, dtype=np.int64).T,
                np.array(numbers, dtype=np.float32).T,
                np.array(authors),
            ],
            logits.device,
        )
        rows = logits.new_empty(len(places), logits.shape[1])
        torch.index_select(batch, 0, bases_at, out=rows[: len(bases)])
        torch.index_select(logits, 0, probes_at, out=rows[len(bases) : len(bases) + len(probes)])
        for place, row in enumerate(kept.values(), start=len(bases) + len(probes)):
            rows[place].copy_(row)
        strengths, _ = strength_of_rows(
            rows, base_of, probe_of, top_p=top_p, maximum=maximum, kl=divided, form=self._form
        )
        strengths = (strengths * sign).float()
        self.requests.pool.values.index_copy_(0, pool_at, strengths)
        self._on_host.append(HostCopy.of(strengths))

    def rehearse(self, logits: torch.Tensor) -> None:
        """Work strengths out of ``logits`` at the largest that a step does at once, for nobody.

        Compiles what it runs on for such logits, and shows vLLM's memory profile what it takes.
        """
        rows = logits.new_zeros(2 * _DOSES_AT_ONCE, logits.shape[1])
        (doses,) = upload([np.arange(_DOSES_AT_ONCE, dtype=np.int64)], logits.device)
        top_p, maximum = torch.ones(2, _DOSES_AT_ONCE, device=logits.device)
        strength_of_rows(
            rows,
            doses,
            doses + _DOSES_AT_ONCE,
            top_p=top_p * 0.5,
            maximum=maximum,
            kl=top_p > 1,
            form=self._form,
        )

    def take_answer(self) -> "WorkedOut | None":
        """The strengths worked out since the last answer, on their way to the host."""
        answer = WorkedOut(self._worked_out, self._on_host) if self._worked_out else None
        self._worked_out, self._on_host = [], []
        return answer


def _jobs(arrival: Arrival) -> list[_Job]:
    """The doses of a complete arrival that act at its step."""
    of: dict[Role, int | torch.Tensor] = {**arrival.request.kept, **arrival.rows}
    return [
        _Job(arrival, index, of[None], of[index]) for index in arrival.request.active(arrival.step)
    ]


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
