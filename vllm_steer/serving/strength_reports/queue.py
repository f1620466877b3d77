"""The queue between engine and consumer, for requests that ask for their strengths."""

from typing import Any

from vllm.outputs import RequestOutput
from vllm.v1.engine.output_processor import RequestOutputCollector

from vllm_steer.serving.strength_reports.delivery import (
    RESPONSE_STRENGTHS,
    ResponseStrengths,
    extend,
)


class ReportingQueue(RequestOutputCollector):  # type: ignore[misc]
    """vLLM's queue between engine and consumer. Merged outputs keep the strengths of all their
    tokens, and outputs that a response handler takes are noted in ``steer_response``.
    """

    steer_request_id: str
    steer_response: ResponseStrengths | None

    def put(self, output: Any) -> None:
        pending = self.output if self.aggregate else None
        merged = {completion.index: completion for completion in _completions(pending)}
        super().put(output)
        for completion in _completions(output) if merged else ():
            if completion.index in merged:
                extend(merged[completion.index].steer_strengths, completion.steer_strengths)

    async def get(self) -> Any:
        return self._noted(await super().get())

    def get_nowait(self) -> Any:
        return self._noted(super().get_nowait())

    def _noted(self, output: Any) -> Any:
        if self.steer_response is not None:
            for completion in _completions(output):
                self.steer_response.put(
                    self.steer_request_id,
                    completion.index,
                    completion.steer_strengths,
                    delta=self.aggregate,
                )
        return output


def report_deliveries(state: Any) -> None:
    """Make the queue of a request state a ``ReportingQueue``. The sequences of a prompt share it.

    Streaming input has a queue of its own from vLLM 0.33 on and no strengths to report.
    """
    queue = state.queue
    if type(queue) is not RequestOutputCollector:
        return
    queue.__class__ = ReportingQueue
    queue.steer_request_id = state.external_req_id
    queue.steer_response = RESPONSE_STRENGTHS.get()
    if queue.steer_response is not None:
        parent = state.parent_req
        num_sequences = 1 if parent is None else parent.sampling_params.n
        queue.steer_response.expect(state.external_req_id, num_sequences)


def _completions(output: Any) -> list[Any]:
    """The completions of an output, which may also be an error or None."""
    return output.outputs if isinstance(output, RequestOutput) else []
