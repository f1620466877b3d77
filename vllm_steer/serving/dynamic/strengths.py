"""Computes the strengths of the next token from a step's logits, on the device.

Base and probe streams have rows in the batch; the probe of a dose at the LM head is an extra row of
the same product, from its base's hidden state. If base and probes of a request are computed in
different steps, the rows of the first steps are kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from vllm_steer.dynamic import strength_of_rows
from vllm_steer.kernels.divergence import DivergenceBackend
from vllm_steer.kernels.upload import upload
from vllm_steer.serving.dynamic.messages import StreamStep, StrengthsByRequest
from vllm_steer.serving.dynamic.requests import DynamicRequest, DynamicRequests, Role


@dataclass(frozen=True)
class HeadProbe:
    """An extra LM-head row: the hidden state of ``row`` steered by one dose."""

    row: int
    steer: str
    strength: float


@dataclass(eq=False)
class RequestLogits:
    """The logits rows that a step has for one request, by role."""

    main: str
    request: DynamicRequest
    step: int
    rows: dict[Role, int] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """True if the rows of base and all probes of the step are available."""
        needed_roles = {None, *self.request.active(self.step)}
        return needed_roles <= self.rows.keys() | self.request.stored_rows.keys()


@dataclass(eq=False)
class DynamicStep:
    """The strengths to compute from the logits of one step.

    probes     the extra rows of the LM head's product, after the R rows of the batch
    request_logits   the logits rows of base and probes, by request
    alone      rows of requests that are their own base: computed again under their strengths
    steps      the generation step by id of a user's request that has dynamic doses at the head
               and computes its last token
    """

    probes: list[HeadProbe]
    request_logits: list[RequestLogits]
    alone: list[int]
    steps: dict[str, int]


@dataclass
class PendingStrengths:
    """Strengths that are being copied to the host.

    keys    request id and index of the dose, in the order of the numbers in ``copies``
    copies  each with the event that follows it, None on a CPU
    """

    keys: list[tuple[str, int]] = field(default_factory=list)
    copies: list[tuple[torch.Tensor, torch.cuda.Event | None]] = field(default_factory=list)

    def add(self, keys: Sequence[tuple[str, int]], strengths: torch.Tensor) -> None:
        """Start the copy of some strengths without waiting for it."""
        self.keys += keys
        if strengths.device.type == "cpu":
            self.copies.append((strengths, None))
            return
        host = torch.empty(strengths.shape, dtype=strengths.dtype, pin_memory=True)
        host.copy_(strengths, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self.copies.append((host, event))

    def read(self) -> StrengthsByRequest:
        """The strengths; called when the step's tokens, which are copied later, are on the host."""
        numbers: list[float] = []
        for host, event in self.copies:
            if event is not None:
                event.synchronize()
            numbers += host.tolist()
        by_request: StrengthsByRequest = {}
        for (main, index), strength in zip(self.keys, numbers, strict=True):
            by_request.setdefault(main, {})[index] = strength
        return by_request


_DOSES_AT_ONCE = 64
"""Limits the logits rows that are copied at once: two per dose."""


@dataclass(frozen=True, eq=False)
class _Job:
    """A dose whose strength this step can compute, and its base and probe logits.

    Logits are given as a row number, of the batch's logits or the probes' after them, or as the
    row ``[V]`` itself if it was kept from an earlier step.
    """

    entry: RequestLogits
    index: int
    base: int | torch.Tensor
    probe: int | torch.Tensor


class StrengthComputation:
    """Computes strengths and stores them: in the pool, and for the scheduler's process."""

    def __init__(self, requests: DynamicRequests, backend: DivergenceBackend | None = None) -> None:
        self.requests = requests
        self._backend = backend
        self._pending = PendingStrengths()

    def plan(self, streams: StreamStep, req_ids: Sequence[str]) -> DynamicStep | None:
        """What a step with these rows has to compute; None without dynamic requests."""
        row_of = {req_id: row for row, req_id in enumerate(req_ids)}
        request_logits: dict[str, RequestLogits] = {}
        steps: dict[str, int] = {}
        for req_id, step in streams.steps.items():
            role = self.requests.role(req_id)
            dynamic_request = self.requests.get(req_id)
            if dynamic_request is not None and dynamic_request.at_head:
                steps[req_id] = step
            if role is None:
                continue
            main, request, dose = role
            # vLLM computes an earlier step again if it has dropped the tokens after it.
            if step != request.last_step:
                entry = request_logits.setdefault(main, RequestLogits(main, request, step))
                entry.rows[dose] = row_of[req_id]
        if not request_logits and not steps:
            return None
        probes: list[HeadProbe] = []
        for entry in request_logits.values():
            self._add_probes(entry, probes, len(row_of))
        alone = [a.rows[None] for a in request_logits.values() if a.request.alone]
        return DynamicStep(probes, list(request_logits.values()), alone, steps)

    @staticmethod
    def _add_probes(entry: RequestLogits, probes: list[HeadProbe], num_rows: int) -> None:
        """Add the probes of doses at the head, whose hidden state is that of the base row."""
        request = entry.request
        if None not in entry.rows:
            return
        for index in request.active(entry.step):
            if index not in request.probed:
                dose = request.doses[index]
                entry.rows[index] = num_rows + len(probes)
                probes.append(HeadProbe(entry.rows[None], dose.entry, dose.strength))

    def compute(
        self, step: DynamicStep, batch: torch.Tensor, logits: torch.Tensor, first: int
    ) -> None:
        """Compute the strengths of the doses whose probes are in this part of the logits, and keep
        the rows of requests that wait for other streams.

        ``logits`` are the rows from ``first`` on, ``batch`` those from 0 on, at least the batch's.
        Rows kept from earlier steps count to the part that begins at 0.
        """
        rows = range(first, first + logits.shape[0])
        jobs = [
            job
            for entry in step.request_logits
            if entry.is_complete
            for job in _jobs(entry)
            if (job.probe in rows if isinstance(job.probe, int) else first == 0)
        ]
        for start in range(0, len(jobs), _DOSES_AT_ONCE):
            self._write(jobs[start : start + _DOSES_AT_ONCE], batch, logits, first)
        for entry in step.request_logits:
            if not entry.is_complete:
                for role, row in entry.rows.items():
                    if row in rows:
                        entry.request.stored_rows[role] = logits[row - first].clone()

    def finish_step(self, step: DynamicStep) -> None:
        """Drop stored rows after all parts have been computed."""
        for entry in step.request_logits:
            if entry.is_complete:
                entry.request.last_step, entry.request.stored_rows = entry.step, {}

    def _write(
        self, jobs: Sequence[_Job], batch: torch.Tensor, logits: torch.Tensor, first: int
    ) -> None:
        """Compute the strengths of some doses into the pool and start their copy to the host."""
        stored_rows = {
            id(row): row
            for job in jobs
            for row in (job.base, job.probe)
            if not isinstance(row, int)
        }
        bases = sorted({job.base for job in jobs if isinstance(job.base, int)})
        probes = sorted({job.probe for job in jobs if isinstance(job.probe, int)})
        row_index = {
            key: index
            for index, key in enumerate(
                [
                    *(("base", row) for row in bases),
                    *(("probe", row) for row in probes),
                    *stored_rows,
                ]
            )
        }
        table, numbers, authors = [], [], []
        for job in jobs:
            request = job.entry.request
            dose = request.doses[job.index]
            assert dose.dynamic is not None
            base = ("base", job.base) if isinstance(job.base, int) else id(job.base)
            probe = ("probe", job.probe) if isinstance(job.probe, int) else id(job.probe)
            pool_index = request.starts[job.index] + job.entry.step
            table.append((row_index[base], row_index[probe], pool_index))
            numbers.append((dose.dynamic.top_p, abs(dose.strength), np.sign(dose.strength)))
            authors.append(dose.dynamic.kl == "authors")
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
        rows = logits.new_empty(len(row_index), logits.shape[1])
        torch.index_select(batch, 0, bases_at, out=rows[: len(bases)])
        torch.index_select(logits, 0, probes_at, out=rows[len(bases) : len(bases) + len(probes)])
        for index, row in enumerate(stored_rows.values(), start=len(bases) + len(probes)):
            rows[index].copy_(row)
        strengths, _ = strength_of_rows(
            rows, base_of, probe_of, top_p=top_p, maximum=maximum, kl=divided, backend=self._backend
        )
        strengths = (strengths * sign).float()
        self.requests.pool.values.index_copy_(0, pool_at, strengths)
        self._pending.add([(job.entry.main, job.index) for job in jobs], strengths)

    def warm_up(self, logits: torch.Tensor) -> None:
        """Compute the largest number of strengths that a step computes at once, and drop them.

        This compiles the kernels for such logits and enters vLLM's memory profile.
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
            backend=self._backend,
        )

    def pop_results(self) -> PendingStrengths | None:
        """The strengths computed since the last call; None if there are none."""
        pending, self._pending = self._pending, PendingStrengths()
        return pending if pending.keys else None


def _jobs(entry: RequestLogits) -> list[_Job]:
    """The doses of a complete entry that act at its step."""
    of: dict[Role, int | torch.Tensor] = {**entry.request.stored_rows, **entry.rows}
    return [_Job(entry, index, of[None], of[index]) for index in entry.request.active(entry.step)]
