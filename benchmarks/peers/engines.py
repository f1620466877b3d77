"""Engines whose requests are changed on their way in."""

from typing import Any

STEER = "steer"


class Rewritten:
    """An engine that ``decode.run_leg`` drives as any other, with requests rewritten on the way in.

    ``request(steer)`` is called with what a request asks for (None: for no steer), and gives the
    keywords of ``add_request`` that it has in place of it.
    """

    def __init__(self, llm: Any) -> None:
        self._engine = llm.llm_engine
        self.step = self._engine.step
        self.has_unfinished_requests = self._engine.has_unfinished_requests

    @property
    def llm_engine(self) -> "Rewritten":
        """Itself: what ``run_leg`` asks an ``LLM`` for."""
        return self

    def request(self, steer: str | None) -> dict[str, Any]:
        """Keywords of ``add_request``."""
        raise NotImplementedError

    def add_request(self, request_id: str, prompt: Any, params: Any) -> None:
        """As vLLM's."""
        keywords = self.request((params.extra_args or {}).get(STEER))
        params.extra_args = None
        self._engine.add_request(request_id, prompt, params, **keywords)
