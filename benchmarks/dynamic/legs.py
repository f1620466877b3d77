"""Batches in an engine of this process, and the time of a token in them.

All requests of a leg start together, greedy, without end of text, each with a prompt of its own
that no other leg had. A request with dynamic strength has a token every second step, all others one
every step: the *time of a token* is half the time that the first request takes for two tokens,
the median over its tokens but the first and last ones.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from benchmarks.engines import greedy

PROMPT_TOKENS = 32
LEAD_TOKENS = 4
TAIL_TOKENS = 1
Steer = Any


@dataclass(frozen=True)
class Leg:
    """One batch: the time of a token, that of the whole, and what each request wrote."""

    token_ms: float
    seconds: float
    tokens: tuple[tuple[int, ...], ...]


@dataclass
class Prompts:
    """Prompts of random tokens; ``next_leg`` draws new ones."""

    vocab_size: int
    leg: int = 0

    def next_leg(self) -> "Prompts":
        """From here on each request has another prompt."""
        self.leg += 1
        return self

    def __getitem__(self, row: int) -> list[int]:
        generator = torch.Generator().manual_seed(1000 * self.leg + row)
        return torch.randint(3, self.vocab_size, (PROMPT_TOKENS,), generator=generator).tolist()


def run_leg(
    llm: Any, prompts: Prompts, steers: Sequence[Steer], tokens: int, *, counted: int | None = None
) -> Leg:
    """Serve one batch, a request per entry of ``steers`` (None: no steer), until the first
    ``counted`` of them have written ``tokens`` tokens; the others are then ended.
    """
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    counted = len(steers) if counted is None else counted
    written: list[list[int]] = [[] for _ in steers]
    arrivals: list[float] = []
    given = [{"prompt_token_ids": prompts[row]} for row in range(len(steers))]
    start = perf_counter()
    for row, steer in enumerate(steers):
        params = greedy(tokens, steer, output_kind=RequestOutputKind.DELTA)
        engine.add_request(str(row), given[row], params)
    running = set(range(counted))
    while running:
        outputs = engine.step()
        now = perf_counter()
        for output in outputs:
            row = int(output.request_id)
            written[row] += output.outputs[0].token_ids
            if row == 0 and output.outputs[0].token_ids:
                arrivals.append(now)
            if output.finished:
                running.discard(row)
    seconds = perf_counter() - start
    engine.abort_request([str(row) for row in range(counted, len(steers))])
    while engine.has_unfinished_requests():
        engine.step()
    assert all(len(written[row]) == tokens for row in range(counted)), "a request ended early"
    return Leg(token_time_ms(arrivals), seconds, tuple(map(tuple, written)))


def token_time_ms(arrivals: Sequence[float]) -> float:
    """The time of a token from the moments at which a request's tokens came."""
    kept = arrivals[LEAD_TOKENS : len(arrivals) - TAIL_TOKENS]
    pairs = zip(kept, kept[2:], strict=False)
    return statistics.median((later - earlier) / 2 for earlier, later in pairs) * 1e3
