"""The dynamic requests of a batch: what comes and goes with a step, and what the step works out."""

from collections.abc import Sequence
from typing import Any

import torch

from vllm_steer.doses import is_dynamic
from vllm_steer.kernels.dispatch import divergence_form
from vllm_steer.plan import SteerPlan
from vllm_steer.serving.request_args import doses_of, stream_of
from vllm_steer.serving.rows import SteeredRequest
from vllm_steer.serving.streams.message import Turn
from vllm_steer.serving.streams.pool import StrengthPool
from vllm_steer.serving.streams.requests import DynamicRequests
from vllm_steer.serving.streams.strengths import StepStrengths, Strengths


class DynamicPart:
    """What a batch keeps for dynamic strengths; ``step`` is None where a step works none out."""

    def __init__(self, plan: SteerPlan, device: torch.device) -> None:
        self.pool = StrengthPool(device)
        self.requests = DynamicRequests(plan, self.pool)
        self.strengths = Strengths(self.requests, divergence_form(plan.kernels, device))
        self.step: StepStrengths | None = None
        self._plan = plan
        self._turn: Turn | None = None

    def begin(self, turn: Turn | None) -> None:
        """Start a step, with what the scheduler says of it."""
        self._turn, self.step = turn, None

    def announce(self, req_ids: Sequence[str]) -> None:
        """The rows of the step that has begun."""
        if self._turn is not None:
            self.step = self.strengths.plan(self._turn, req_ids)

    def steered(self, req_id: str, params: Any, prompt_len: int) -> SteeredRequest | None:
        """What a new request or stream takes, its role noted; None if it takes nothing."""
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
