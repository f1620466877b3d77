"""What one sequence's strengths have been so far."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_steer.errors import SteerRequestError
from vllm_steer.serving.expected_strengths import EXPECTATION, expect_strengths
from vllm_steer.serving.request_args import asked_steer, asked_strengths

Strengths = dict[str, list[float]]
"""By steer, one number per token."""


@dataclass(eq=False)
class Record:
    """The strengths of one sequence, as long as its request lives.

    asked      whether its outputs carry them
    maxima     by steer, where the doses are known in this process
    strengths  of all tokens so far; empty lists if nobody asked
    num_sent   tokens in the outputs made so far, where outputs carry new tokens only
    is_counted whether the counters know of the sequence
    """

    asked: bool
    maxima: Mapping[str, float]
    strengths: Strengths = field(init=False)
    num_sent: int = 0
    is_counted: bool = False

    def __post_init__(self) -> None:
        self.strengths = {steer: [] for steer in self.maxima}

    def add(self, strengths: Mapping[str, float]) -> None:
        """Keep the strengths of one more token."""
        if self.asked:
            for steer, strength in strengths.items():
                self.strengths.setdefault(steer, []).append(strength)

    def of_output(self, num_tokens: int, *, delta: bool) -> Strengths:
        """The strengths of an output's tokens: the first ones or, of a ``delta``, the next ones.

        Tokens that a stop string cut off were added and are in no output.
        """
        first = self.num_sent if delta else 0
        self.num_sent = first + num_tokens
        return {steer: all_[first : self.num_sent] for steer, all_ in self.strengths.items()}


def record_for(sampling_params: Any) -> Record | None:
    """A new sequence's record; None if it has no dynamic strength and does not ask."""
    asked = asked_strengths(sampling_params)
    if asked:
        expect_strengths()
    maxima = _maxima(sampling_params)
    return Record(asked, maxima) if asked or maxima else None


def _maxima(sampling_params: Any) -> dict[str, float]:
    if EXPECTATION.plan is None:
        return {}
    try:
        doses = EXPECTATION.plan.doses(asked_steer(sampling_params))
    except SteerRequestError:  # admitted by another engine of this process, under its own plan
        return {}
    return {dose.steer: dose.strength for dose in doses if dose.dynamic}
