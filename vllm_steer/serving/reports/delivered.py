"""Strengths that a server's response handler has taken from the engine and not yet sent."""

from contextvars import ContextVar

from vllm_steer.serving.reports.record import Strengths


class Delivered:
    """By prompt and sequence, the strengths of the tokens that were handed over since the last
    ``take``. One for each HTTP request that asks.
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


def extend(strengths: Strengths, more: Strengths) -> None:
    """Add ``more`` tokens behind those of ``strengths``."""
    for steer, values in more.items():
        strengths.setdefault(steer, []).extend(values)


DELIVERED: ContextVar[Delivered | None] = ContextVar("vllm_steer_delivered", default=None)
"""Of the HTTP request that is being served: the middleware sets it, and all tasks that vLLM starts
for the request inherit it.
"""
