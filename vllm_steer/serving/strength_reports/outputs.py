"""Strengths in vLLM's output processor: taken off engine outputs, put on completions.

An engine output of a dynamic request carries ``kv_transfer_params["vllm_steer"]["strengths"]``, by
steer, for its one new token. vLLM's own code gets the output without it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_steer.errors import SteerRequestError
from vllm_steer.serving.dynamic.messages import STRENGTHS_KEY
from vllm_steer.serving.reporting_state import REPORTING, enable_reporting
from vllm_steer.serving.request_args import STRENGTHS, doses_of, wants_strengths
from vllm_steer.serving.strength_reports.delivery import Strengths
from vllm_steer.serving.strength_reports.metrics import count_sequence, count_token

_ATTRIBUTE = "steer_sequence_strengths"


@dataclass(eq=False)
class SequenceStrengths:
    """The strengths of one sequence, as long as its request lives.

    is_asked   whether its outputs carry them
    maxima     by steer, where the doses are known in this process
    strengths  of all tokens so far; empty lists if nobody asks
    num_sent   tokens in the outputs made so far, where outputs carry new tokens only
    is_counted whether the metrics have counted the sequence
    """

    is_asked: bool
    maxima: Mapping[str, float]
    strengths: Strengths = field(init=False)
    num_sent: int = 0
    is_counted: bool = False

    def __post_init__(self) -> None:
        self.strengths = {steer: [] for steer in self.maxima}

    def add(self, strengths: Mapping[str, float]) -> None:
        """Add one more token to the metrics, and keep its strengths for the outputs."""
        if not self.is_counted:
            self.is_counted = True
            count_sequence()
        count_token(strengths, self.maxima)
        if self.is_asked:
            for steer, strength in strengths.items():
                self.strengths.setdefault(steer, []).append(strength)

    def of_output(self, num_tokens: int, *, delta: bool) -> Strengths:
        """The strengths of an output's tokens: the first ones or, of a ``delta``, the next ones.

        Tokens that a stop string cut off were added and are in no output.
        """
        first = self.num_sent if delta else 0
        self.num_sent = first + num_tokens
        return {steer: all_[first : self.num_sent] for steer, all_ in self.strengths.items()}


def with_sequence_strengths(
    original: Callable[..., Any], self: Any, request: Any, *args: Any, **kwargs: Any
) -> Any:
    """``OutputProcessor.add_request`` that also attaches ``SequenceStrengths``, if needed."""
    result = original(self, request, *args, **kwargs)
    state = self.request_states.get(request.request_id)
    if state is not None and request.sampling_params is not None:
        _attach(state, request.sampling_params)
    return result


def with_strengths_taken(
    original: Callable[..., Any], self: Any, outputs: Any, *args: Any, **kwargs: Any
) -> Any:
    """``OutputProcessor.process_outputs``, given outputs without strengths, which are kept."""
    if REPORTING.is_enabled:
        take_strengths(outputs, self.request_states)
    return original(self, outputs, *args, **kwargs)


def with_strengths_on_completion(
    original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any
) -> Any:
    """``RequestState._new_completion_output`` with ``steer_strengths``, if they were asked for.

    As many numbers per steer as the output has ``token_ids``, whatever kind of output it is.
    """

    completion = original(self, *args, **kwargs)
    sequence = getattr(self, _ATTRIBUTE, None) if REPORTING.is_enabled else None
    if sequence is not None and sequence.is_asked:
        delta = self.output_kind.name == "DELTA"
        num_tokens = len(completion.token_ids)
        setattr(completion, STRENGTHS, sequence.of_output(num_tokens, delta=delta))
    return completion


def take_strengths(outputs: Iterable[Any], request_states: Mapping[str, Any]) -> None:
    """Move the strengths of all ``outputs`` to their sequences."""
    for output in outputs:
        params = output.kv_transfer_params
        if params is None or STRENGTHS_KEY not in params:
            continue
        # A new dict: an engine core in this process still holds the one that it sent.
        output.kv_transfer_params = {k: v for k, v in params.items() if k != STRENGTHS_KEY} or None
        sequence: SequenceStrengths | None = getattr(
            request_states.get(output.request_id), _ATTRIBUTE, None
        )
        if sequence is not None and output.new_token_ids:
            sequence.add(params[STRENGTHS_KEY]["strengths"])


def sequence_strengths(sampling_params: Any) -> SequenceStrengths | None:
    """For a new sequence; None if it has no dynamic strength and does not ask."""
    is_asked = wants_strengths(sampling_params)
    if is_asked:
        enable_reporting()
    maxima = _maxima(sampling_params)
    return SequenceStrengths(is_asked, maxima) if is_asked or maxima else None


def _attach(state: Any, sampling_params: Any) -> None:
    if hasattr(state, _ATTRIBUTE):  # a further chunk of streaming input
        return
    sequence = sequence_strengths(sampling_params)
    if sequence is None:
        return
    setattr(state, _ATTRIBUTE, sequence)
    if sequence.is_asked and state.queue is not None:
        from vllm_steer.serving.strength_reports.queue import report_deliveries

        report_deliveries(state)


def _maxima(sampling_params: Any) -> dict[str, float]:
    if REPORTING.plan is None:
        return {}
    try:
        doses = doses_of(sampling_params, REPORTING.plan)
    except SteerRequestError:  # admitted by another engine of this process, under its own plan
        return {}
    return {dose.steer: dose.strength for dose in doses if dose.dynamic}
