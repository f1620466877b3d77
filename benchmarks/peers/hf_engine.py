"""Greedy decoding of one batch on a Hugging Face model, step by step.

The interface is the part of vLLM's engine that ``decode.run_leg`` uses, so that both are timed by
the same lines. A step does what ``generate`` does for greedy search: one forward pass with the KV
cache (``DynamicCache``), the likeliest token of the last position, and one look at it on the host.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch


@dataclass
class _Row:
    """A request: its prompt, and what has come so far."""

    request_id: str
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    logprob: float = 0.0


class HuggingFaceEngine:
    """One batch at a time, of prompts of one length; ``set_steer(steer or None)`` is called with
    what all of its requests ask for."""

    def __init__(self, model: Any, set_steer: Callable[[str | None], None]) -> None:
        self._model = model
        self._set_steer = set_steer
        self._rows: list[_Row] = []
        self._steers: set[str | None] = set()
        self._forced: Sequence[Sequence[int]] | None = None

    @property
    def llm_engine(self) -> "HuggingFaceEngine":
        """Itself: what ``run_leg`` asks an ``LLM`` for."""
        return self

    @contextmanager
    def following(self, tokens: Sequence[Sequence[int]]) -> Iterator[None]:
        """Within the block row ``b`` goes on with ``tokens[b]``, whatever is likeliest."""
        self._forced = tokens
        try:
            yield
        finally:
            self._forced = None

    def add_request(self, request_id: str, prompt: Any, params: Any) -> None:
        """As vLLM's; only the parameters that ``run_leg`` sets are looked at."""
        self._steers.add((params.extra_args or {}).get("steer"))
        self._rows.append(_Row(request_id, prompt["prompt_token_ids"]))
        self._wanted, self._scored = params.max_tokens, params.logprobs is not None
        self._cache, self._inputs = None, None

    def has_unfinished_requests(self) -> bool:
        """Whether the batch goes on."""
        return bool(self._rows)

    @torch.inference_mode()
    def step(self) -> list[Any]:
        """One token for every row; the outputs of all rows with the last one, else none."""
        if self._cache is None:
            self._begin()
        output = self._model(
            self._inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        self._cache, logits = output.past_key_values, output.logits[:, -1]
        chosen = self._choose(logits)
        self._inputs = chosen[:, None]
        self._record(chosen, logits)
        return self._finish() if len(self._rows[0].tokens) == self._wanted else []

    def _begin(self) -> None:
        (steer,) = self._steers  # one for the whole batch
        self._set_steer(steer)
        prompts = [row.prompt for row in self._rows]
        self._inputs = torch.tensor(prompts, device=self._model.device)

    def _choose(self, logits: torch.Tensor) -> torch.Tensor:
        if self._forced is None:
            return logits.argmax(-1)
        place = len(self._rows[0].tokens)
        return torch.tensor([tokens[place] for tokens in self._forced], device=logits.device)

    def _record(self, chosen: torch.Tensor, logits: torch.Tensor) -> None:
        for row, token in zip(self._rows, chosen.tolist(), strict=True):
            row.tokens.append(token)
        if self._scored:
            scores = logits.float().log_softmax(-1).gather(1, chosen[:, None])
            for row, score in zip(self._rows, scores[:, 0].tolist(), strict=True):
                row.logprob += score

    def _finish(self) -> list[Any]:
        rows, self._rows, self._steers = self._rows, [], set()
        self._cache = None
        return [
            SimpleNamespace(
                request_id=row.request_id,
                outputs=[SimpleNamespace(token_ids=row.tokens, cumulative_logprob=row.logprob)],
            )
            for row in rows
        ]
