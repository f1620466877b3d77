"""The steered requests of a worker, and the step that it runs.

A runner adapter calls ``begin_step`` when a step begins and ``announce`` once its rows and tokens
are known. The batch passes both on to the LM head's view of it, ``head_rows``, and to the sites
inside the layers. A step that was begun but not announced means that vLLM no longer calls what the
adapter wraps: that is an error, so nothing runs unsteered unnoticed.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from vllm_steer.compat.patching import unknown_behavior
from vllm_steer.doses import is_dynamic
from vllm_steer.kernels.lm_steer import LMSteerBackend
from vllm_steer.plan import SteerPlan
from vllm_steer.serving.dynamic.messages import StreamStep
from vllm_steer.serving.dynamic.worker_state import DynamicState
from vllm_steer.serving.gates import GateTable, RequestGates
from vllm_steer.serving.head_rows import HeadRows
from vllm_steer.serving.mapped_site import MappedSite
from vllm_steer.serving.placeholders import placeholder_bounds
from vllm_steer.serving.request_args import doses_of, stream_of
from vllm_steer.serving.step import SteeredRequest, Step


class NewRequest(NamedTuple):
    """A request that a step brings; ``mm_features`` are vLLM's places of images, audio and video
    in its prompt.
    """

    req_id: str
    sampling_params: Any
    prompt_len: int
    mm_features: Sequence[Any] | None = None


class SteeredBatch:
    """The steered requests of one worker, by id. ``max_rows`` bounds the logits rows of a step;
    ``gates`` is None in an engine without conditions.
    """

    def __init__(
        self,
        plan: SteerPlan,
        device: torch.device,
        backend: LMSteerBackend,
        sites: Sequence[MappedSite] = (),
        *,
        max_rows: int | None = None,
        gates: GateTable | None = None,
    ) -> None:
        self.dynamic = DynamicState(plan, device)
        self._plan = plan
        self._requests: dict[str, SteeredRequest] = {}
        self._sites = sites
        self._gates = gates
        self._is_announced = False
        self._strengths = self.dynamic.pool.values
        self.head_rows = HeadRows(
            self._requests,
            self.dynamic,
            backend,
            device,
            max_rows=max_rows,
            max_doses=plan.limits.max_steers_per_request,
            gates=None if gates is None else gates.gates,
        )

    @property
    def has_steered_requests(self) -> bool:
        """Whether any live request of this worker is steered."""
        return bool(self._requests or self.dynamic.requests)

    def begin_step(
        self,
        new: Iterable[NewRequest | tuple[str, Any, int]],
        finished: Iterable[str],
        streams: StreamStep | None = None,
    ) -> None:
        """Start a step: new requests, ids that ended, and the scheduler's message about the streams
        of dynamic requests.
        """
        self._is_announced = False
        self.dynamic.begin_step(streams)
        for req_id in finished:
            if self.dynamic.requests.num_known:
                self.dynamic.requests.remove(req_id)
            if self._gates is not None:
                self._gates.give_back(req_id)
            self._set_request(req_id, None)
        for entry in new:
            arrival = NewRequest(*entry)
            self._set_request(
                arrival.req_id,
                steered_request(
                    *arrival[:3], self._plan, self.dynamic, arrival.mm_features, self._gates
                ),
            )
        if self._strengths is not self.dynamic.pool.values:  # it has grown
            self._strengths = self.dynamic.pool.values
            self._invalidate_sites()
        self.head_rows.begin_step()
        for site in self._sites:
            if self.has_steered_requests:
                site.begin_step()
            else:
                site.disable()

    def begin_dummy_run(self) -> None:
        """The next forward pass is a dummy run."""
        self.head_rows.begin_dummy_run()
        for site in self._sites:
            site.disable()

    def announce(self, step: Step) -> None:
        """The rows and tokens of the step that has begun."""
        self._is_announced = True
        self.head_rows.announce(step)
        for site in self._sites:
            site.prepare(step, self._requests, self._strengths)
        self.dynamic.announce(step.req_ids)

    def require_announced(self) -> None:
        """Raise if the step that has begun has ended without ``announce``, with steered requests.

        Its layers then ran on the doses of another step, or on none.
        """
        if self.has_steered_requests and not self._is_announced:
            raise RuntimeError(
                unknown_behavior("a step with steered requests ran without its rows")
            )

    def _set_request(self, req_id: str, request: SteeredRequest | None) -> None:
        if request is not None:
            self._requests[req_id] = request
        elif self._requests.pop(req_id, None) is None:
            return
        self.head_rows.set_request(req_id, request)
        self._invalidate_sites()

    def _invalidate_sites(self) -> None:
        for site in self._sites:
            site.invalidate()


def steered_request(
    req_id: str,
    params: Any,
    prompt_len: int,
    plan: SteerPlan,
    dynamic: DynamicState,
    mm_features: Sequence[Any] | None = None,
    gate_table: GateTable | None = None,
) -> SteeredRequest | None:
    """A new request or stream with its doses, None if it has none; dynamic ones are added to
    ``dynamic``, gates are taken from ``gate_table``.
    """
    if params is None:
        return None
    doses, stream = doses_of(params, plan), stream_of(params)
    pool_offsets: Mapping[int, int] = {}
    if stream is not None:
        dynamic.add_stream(req_id, stream, params.max_tokens)
    elif is_dynamic(doses):
        pool_offsets = dynamic.add(req_id, doses, params.max_tokens)
    if not doses:
        return None
    placeholders = placeholder_bounds(doses, mm_features, prompt_len)
    gates = RequestGates({}, ())
    if gate_table is not None:
        gates = gate_table.take(req_id, doses, prompt_len)
    return SteeredRequest(doses, prompt_len, pool_offsets, placeholders, gates.gates, gates.tests)
