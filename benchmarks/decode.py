"""Decode steps of an engine in this process.

A leg serves one batch from its prompts to its last tokens and times every engine step. All
requests start together and end together; steps of the prefill and the first and last decode steps
are left out, so each step counted is pure decode of the whole batch. A leg's step time is the
median of its steps: a step that another process disturbed does not move it, which the difference
quotient of two output lengths cannot offer.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

from benchmarks.engines import greedy
from benchmarks.rounds import Round, interleave, median, plain_legs, spread

PROMPT_TOKENS = 8
LEAD_STEPS = 4
TAIL_STEPS = 2
Steers = Sequence[str | None]  # of each row


@dataclass(frozen=True)
class DecodeLeg:
    """One batch: the median decode step in milliseconds, each row's tokens, and the sum of their
    log probabilities if the leg was asked for them."""

    step_ms: float
    tokens: tuple[tuple[int, ...], ...]
    logprobs: tuple[float, ...] = ()


class BenchmarkEngine:
    """A vLLM engine of this process."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def add(self, request_id: str, tokens: list[int], steer: str | None, params: Any) -> None:
        """Add a request; those that know no steers of vllm-steer have an ``add`` of their own."""
        params.extra_args = {"steer": steer} if steer else None
        self.llm.llm_engine.add_request(request_id, {"prompt_token_ids": tokens}, params)

    def start(self, steers: Steers, steps: int, vocab_size: int, *, logprobs: bool = False) -> None:
        """Add a batch; the prompts are the same for every call."""
        for row, steer in enumerate(steers):
            params = greedy(LEAD_STEPS + steps + TAIL_STEPS, logprobs=0 if logprobs else None)
            self.add(str(row), prompt(row, vocab_size), steer, params)

    def leg(
        self, steers: Steers, steps: int, vocab_size: int, *, logprobs: bool = False
    ) -> DecodeLeg:
        """Serve one batch of ``steps`` timed steps."""
        engine, times, completions = self.llm.llm_engine, [], {}
        self.start(steers, steps, vocab_size, logprobs=logprobs)
        while engine.has_unfinished_requests():
            start = perf_counter()
            outputs = engine.step()
            times.append(perf_counter() - start)
            completions.update({int(output.request_id): output.outputs[0] for output in outputs})
        num_returned = len(completions)
        assert num_returned == len(steers), f"{num_returned} of {len(steers)} rows came back"
        rows = [completions[row] for row in range(len(steers))]
        return DecodeLeg(
            step_ms=median_step_ms(times, steps),
            tokens=tuple(tuple(row.token_ids) for row in rows),
            logprobs=tuple(row.cumulative_logprob for row in rows) if logprobs else (),
        )


SteeredRowsOf = tuple[Any, Steers]  # an engine, and what its rows ask for


def median_step_ms(times: Sequence[float], steps: int) -> float:
    """Of the timed steps, in milliseconds."""
    return statistics.median(times[-(steps + TAIL_STEPS) : -TAIL_STEPS]) * 1e3


def prompt(row: int, vocab_size: int) -> list[int]:
    """Token ids."""
    return [1 + (97 * row + i) % (vocab_size - 2) for i in range(PROMPT_TOKENS)]


def compare(
    plain: SteeredRowsOf, other: SteeredRowsOf, steps: int, vocab_size: int, count: int
) -> list[Round]:
    """Rounds of two batches."""
    legs = [partial(engine.leg, steers, steps, vocab_size) for engine, steers in (plain, other)]
    return interleave(legs[0], {"other": legs[1]}, count)["other"]


def step_ms(leg: DecodeLeg) -> float:
    """The figure that is compared."""
    return leg.step_ms


def step_columns(rounds: Sequence[Round[DecodeLeg]]) -> dict[str, float | int]:
    """Medians of both step times, and the spread of the rounds' ratios."""
    return {
        "unsteered_ms": median([leg.step_ms for leg in plain_legs(rounds)]),
        "steered_ms": median([pair.other.step_ms for pair in rounds]),
        **spread("ratio", [pair.ratio(step_ms) for pair in rounds], middle="_median"),
        "rounds": len(rounds),
    }


def profile_steps(
    engine_to_profile: BenchmarkEngine, steers: Steers, steps: int, vocab_size: int
) -> list[dict[str, Any]]:
    """What runs in some decode steps of a batch: device time (on a CPU the host's) by kernel.

    A line has the kernel's name, its calls and microseconds per step; the longest come first.
    Under the profiler steps are slower: read shares and kernels, not step times.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    engine, on_card = engine_to_profile.llm.llm_engine, torch.cuda.is_available()
    engine_to_profile.start(steers, steps, vocab_size)
    for _ in range(LEAD_STEPS):
        engine.step()
    activities = [ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            engine.step()
        if on_card:
            torch.cuda.synchronize()
    while engine.has_unfinished_requests():
        engine.step()
    kind = "self_device_time_total" if on_card else "self_cpu_time_total"
    lines = [
        {
            "kernel": event.key[:120],
            "calls": round(event.count / steps, 2),
            "us": round(getattr(event, kind) / steps, 2),
        }
        for event in profiler.key_averages()
    ]
    return sorted(lines, key=lambda line: -line["us"])[:40]
