"""What a worker keeps for dynamic strengths."""

from collections.abc import Sequence
from typing import Any

import torch

from vllm_steer.doses import is_dynamic
from vllm_steer.kernels.dispatch import divergence_form
from vllm_steer.plan import SteerPlan
from vllm_steer.serving.dynamic.messages import StreamStep
from vllm_steer.serving.dynamic.requests import DynamicRequests, StrengthPool
from vllm_steer.serving.dynamic.strengths import DynamicStep, StrengthComputation
from vllm_steer.serving.request_args import doses_of, stream_of
from vllm_steer.serving.step import SteeredRequest


class DynamicState:
    """A worker's dynamic requests; ``step`` is None where the current step computes no strength."""

    def __init__(self, plan: SteerPlan, device: torch.device) -> None:
        self.pool = StrengthPool(device)
        self.requests = DynamicRequests(plan, self.pool)
        self.strengths = StrengthComputation(self.requests, divergence_form(plan.kernels, device))
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

    def steered_request(self, req_id: str, params: Any, prompt_len: int) -> SteeredRequest | None:
        """Add a new request or stream; its doses, or None if it has none."""
        if params is None:
            return None
        doses, stream = doses_of(params, self._plan), stream_of(params)
        tables: dict[int, int] = {}
        if stream is not None:
            self.requests.add(stream.main, self._plan.doses(stream.steer), params.max_tokens)
            self.requests.add_stream(req_id, stream.main, stream.dose)
        elif is_dynamic(doses):
            tables |= self.requests.add(req_id, doses, params.max_tokens).starts
        return SteeredRequest(doses, prompt_len, tables) if doses else None
