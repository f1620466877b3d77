"""The queue between engine and consumer, for requests that ask for their strengths."""

from typing import Any

from vllm.outputs import RequestOutput
from vllm.v1.engine.output_processor import RequestOutputCollector

from vllm_steer.serving.reports.delivered import DELIVERED, Delivered, extend


class ReportingQueue(RequestOutputCollector):  # type: ignore[misc]
    """vLLM's queue; outputs that it merges keep the strengths of all their tokens, and what a
    server's response handler takes is noted as delivered.
    """

    steer_request_id: str
    steer_delivered: Delivered | None

    def put(self, output: Any) -> None:
        waiting = self.output if self.aggregate else None
        merged = {completion.index: completion for completion in _completions(waiting)}
        super().put(output)
        for completion in _completions(output) if merged else ():
            if completion.index in merged:
                extend(merged[completion.index].steer_strengths, completion.steer_strengths)

    async def get(self) -> Any:
        return self._report(await super().get())

    def get_nowait(self) -> Any:
        return self._report(super().get_nowait())

    def _report(self, output: Any) -> Any:
        if self.steer_delivered is not None:
            for completion in _completions(output):
                self.steer_delivered.put(
                    self.steer_request_id,
                    completion.index,
                    completion.steer_strengths,
                    delta=self.aggregate,
                )
        return output


def report_deliveries(state: Any) -> None:
    """Make a request state's queue report. The sequences of one prompt share it.

    Streaming input, which has a queue of its own from vLLM 0.33 on, has no strengths to report.
    """
    queue = state.queue
    if type(queue) is not RequestOutputCollector:
        return
    queue.__class__ = ReportingQueue
    queue.steer_request_id = state.external_req_id
    queue.steer_delivered = DELIVERED.get()
    if queue.steer_delivered is not None:
        parent = state.parent_req
        num_sequences = 1 if parent is None else parent.sampling_params.n
        queue.steer_delivered.expect(state.external_req_id, num_sequences)


def _completions(output: Any) -> list[Any]:
    """Of an output that may also be an error or nothing yet."""
    return output.outputs if isinstance(output, RequestOutput) else []
