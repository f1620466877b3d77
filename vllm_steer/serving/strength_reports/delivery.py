"""Strengths on their way from the engine's outputs to an HTTP response.

vLLM hands a request's outputs over in a queue. For a request that asks for its strengths the queue
is a ``ReportingQueue``, which notes the strengths of every output that the response handler takes
in the ``ResponseStrengths`` of the HTTP request; the middleware adds them to the response.
"""

from contextvars import ContextVar
from typing import Any

from vllm.outputs import RequestOutput
from vllm.v1.engine.output_processor import RequestOutputCollector

Strengths = dict[str, list[float]]
"""By steer, one number per token."""


class ResponseStrengths:
    """By prompt and sequence, the strengths of the tokens handed over since the last ``take``; one
    object for each HTTP request that asks for strengths.
    """

    def __init__(self) -> None:
        self._num_sequences: dict[str, int] = {}
        self._waiting: dict[tuple[str, int], Strengths] = {}

    def expect(self, request_id: str, num_sequences: int) -> None:
        """A prompt of the HTTP request was given to the engine as ``request_id``."""
        self._num_sequences[request_id] = num_sequences

    def put(self, request_id: str, index: int, strengths: Strengths, *, delta: bool) -> None:
        """A sequence's output was handed over, with its new tokens only or with all of them."""
        waiting = self._waiting.setdefault((request_id, index), {}) if delta else {}
        extend(waiting, strengths)
        self._waiting[request_id, index] = waiting

    def take(self, response_id: str, choice: int) -> Strengths:
        """The strengths of choice number ``choice`` of a response."""
        num_sequences = next(iter(self._num_sequences.values()), 1)
        prompt, index = divmod(choice, num_sequences)
        return self._waiting.pop((self._request_id(response_id, prompt), index), {})

    def take_all(self) -> Strengths:
        """The strengths of all sequences one after the other."""
        strengths: Strengths = {}
        for waiting in self._waiting.values():
            extend(strengths, waiting)
        self._waiting = {}
        return strengths

    def _request_id(self, response_id: str, prompt: int) -> str:
        """vLLM names the requests of several prompts after the response, with their number."""
        if len(self._num_sequences) == 1:
            return next(iter(self._num_sequences))
        names = (f"{response_id}{between}{prompt}" for between in "-_")
        return next((name for name in names if name in self._num_sequences), "")


RESPONSE_STRENGTHS: ContextVar[ResponseStrengths | None] = ContextVar(
    "vllm_steer_response_strengths", default=None
)
"""Those of the HTTP request that is being served: the middleware sets it, and all tasks that vLLM
starts for the request inherit it.
"""


class ReportingQueue(RequestOutputCollector):  # type: ignore[misc]
    """vLLM's queue between engine and consumer. Merged outputs keep the strengths of all their
    tokens, and outputs that a response handler takes are noted in ``steer_response``.
    """

    steer_request_id: str
    steer_response: ResponseStrengths | None

    def put(self, output: Any) -> None:
        waiting = self.output if self.aggregate else None
        merged = {completion.index: completion for completion in _completions(waiting)}
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


def extend(strengths: Strengths, more: Strengths) -> None:
    """Append the strengths of further tokens."""
    for steer, values in more.items():
        strengths.setdefault(steer, []).extend(values)


def _completions(output: Any) -> list[Any]:
    """The completions of an output, which may also be an error or None."""
    return output.outputs if isinstance(output, RequestOutput) else []
