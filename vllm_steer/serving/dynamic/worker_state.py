"""The dynamic requests of a worker, and the strengths that its current step computes."""

from collections.abc import Mapping, Sequence

import torch

from vllm_steer.doses import Dose
from vllm_steer.kernels.dispatch import divergence_backend
from vllm_steer.plan import SteerPlan
from vllm_steer.serving.dynamic.messages import StreamStep
from vllm_steer.serving.dynamic.requests import DynamicRequests, StrengthPool
from vllm_steer.serving.dynamic.strengths import DynamicStep, StrengthComputation
from vllm_steer.serving.request_args import StreamRequest


class DynamicState:
    """A worker's dynamic requests; ``step`` is None where the current step computes no strength."""

    def __init__(self, plan: SteerPlan, device: torch.device) -> None:
        self.pool = StrengthPool(device)
        self.requests = DynamicRequests(plan, self.pool)
        self.strengths = StrengthComputation(
            self.requests, divergence_backend(plan.kernels, device)
        )
        self.step: DynamicStep | None = None
        self._plan = plan
        self._streams: StreamStep | None = None

    def begin_step(self, streams: StreamStep | None) -> None:
        """Start a step, with the scheduler's message about its streams."""
        self._streams, self.step = streams, None

    def announce(self, req_ids: Sequence[str]) -> None:
        """Receive the rows of the current step."""
        if self._streams is not None:
            self.step = self.strengths.plan(self._streams, req_ids)

    def add(self, req_id: str, doses: tuple[Dose, ...], max_tokens: int) -> Mapping[int, int]:
        """Add a request with dynamic doses; by index of the dose, where its strengths begin in the
        pool.
        """
        return self.requests.add(req_id, doses, max_tokens).starts

    def add_stream(self, req_id: str, stream: StreamRequest, max_tokens: int) -> None:
        """Add a base or probe stream, and its request unless that is there already."""
        self.requests.add(stream.main, self._plan.doses(stream.steer, stream.loaded), max_tokens)
        self.requests.add_stream(req_id, stream.main, stream.dose)
