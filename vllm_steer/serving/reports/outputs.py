"""vLLM's output processor with strengths: taken off engine outputs, put on completions.

An engine output of a dynamic request carries ``kv_transfer_params["vllm_steer"]["strengths"]``, by
steer, for its one new token. vLLM's own code sees the output as if this had never been there.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vllm_steer.serving.expected_strengths import EXPECTATION
from vllm_steer.serving.reports.counters import count_token
from vllm_steer.serving.reports.record import Record, record_for
from vllm_steer.serving.request_args import STRENGTHS
from vllm_steer.serving.streams.message import REPORT

RECORD = "steer_record"


def with_record(
    original: Callable[..., Any], self: Any, request: Any, *args: Any, **kwargs: Any
) -> Any:
    """``OutputProcessor.add_request``, which also opens the sequence's record."""
    result = original(self, request, *args, **kwargs)
    state = self.request_states.get(request.request_id)
    if state is not None and request.sampling_params is not None:
        _open_record(state, request.sampling_params)
    return result


def with_strengths_taken(
    original: Callable[..., Any], self: Any, outputs: Any, *args: Any, **kwargs: Any
) -> Any:
    """``OutputProcessor.process_outputs`` on outputs without strengths, which are recorded."""
    if EXPECTATION.strengths:
        take_strengths(outputs, self.request_states)
    return original(self, outputs, *args, **kwargs)


def with_strengths_on_completion(
    original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any
) -> Any:
    """``RequestState._new_completion_output`` with ``steer_strengths``, if they were asked for.

    As many numbers per steer as the output has ``token_ids``, whatever kind of output it is.
    """

    completion = original(self, *args, **kwargs)
    record = getattr(self, RECORD, None) if EXPECTATION.strengths else None
    if record is not None and record.asked:
        delta = self.output_kind.name == "DELTA"
        num_tokens = len(completion.token_ids)
        setattr(completion, STRENGTHS, record.of_output(num_tokens, delta=delta))
    return completion


def take_strengths(outputs: Iterable[Any], request_states: Mapping[str, Any]) -> None:
    """Move the strengths of all ``outputs`` into the records of their requests."""
    for output in outputs:
        params = output.kv_transfer_params
        if params is None or REPORT not in params:
            continue
        # A new dict: an engine core in this process still holds the one that it sent.
        output.kv_transfer_params = {k: v for k, v in params.items() if k != REPORT} or None
        record: Record | None = getattr(request_states.get(output.request_id), RECORD, None)
        if record is not None and output.new_token_ids:
            strengths = params[REPORT]["strengths"]
            count_token(strengths, record)
            record.add(strengths)


def _open_record(state: Any, sampling_params: Any) -> None:
    if hasattr(state, RECORD):  # one more chunk of streaming input
        return
    record = record_for(sampling_params)
    if record is None:
        return
    setattr(state, RECORD, record)
    if record.asked and state.queue is not None:
        from vllm_steer.serving.reports.queue import report_deliveries

        report_deliveries(state)
