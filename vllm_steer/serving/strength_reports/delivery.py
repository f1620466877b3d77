"""Strengths on their way from the engine's outputs to an HTTP response.

``ReportingQueue`` notes the strengths of every output that a response handler takes in the
``ResponseStrengths`` of its HTTP request, and the middleware adds them to the response. The
middleware serves every steered server: nothing of vLLM that dynamic strength alone needs is
imported here.
"""

from contextvars import ContextVar

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
        pending = self._waiting.setdefault((request_id, index), {}) if delta else {}
        extend(pending, strengths)
        self._waiting[request_id, index] = pending

    def take(self, response_id: str, choice: int) -> Strengths:
        """The strengths of choice number ``choice`` of a response."""
        num_sequences = next(iter(self._num_sequences.values()), 1)
        prompt, index = divmod(choice, num_sequences)
        return self._waiting.pop((self._request_id(response_id, prompt), index), {})

    def take_all(self) -> Strengths:
        """The strengths of all sequences one after the other."""
        strengths: Strengths = {}
        for pending in self._waiting.values():
            extend(strengths, pending)
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


def extend(strengths: Strengths, more: Strengths) -> None:
    """Append the strengths of further tokens."""
    for steer, values in more.items():
        strengths.setdefault(steer, []).extend(values)
