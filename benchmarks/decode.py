"""Decode steps of an engine in this process.

A leg serves one batch from its prompts to its last tokens and times every engine step. All requests
start and end together; prefill steps and the first and last decode steps are left out, so each
counted step is pure decode of the whole batch. A leg's step time is the median of its steps: unlike
a difference of two output lengths, it is robust to a step that another process disturbed.
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
Steers = Sequence[str | None]  # the steer of each row


@dataclass(frozen=True)
class DecodeLeg:
    """One batch: the median decode step in milliseconds, each row's tokens, and, if requested, the
    sum of their log probabilities."""

    step_ms: float
    tokens: tuple[tuple[int, ...], ...]
    logprobs: tuple[float, ...] = ()


class BenchmarkEngine:
    """A vLLM engine of this process."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def add(self, request_id: str, tokens: list[int], steer: str | None, params: Any) -> None:
        """Add a request; engines without vllm-steer override this method."""
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


SteeredRowsOf = tuple[Any, Steers]  # an engine, and the steer that each of its rows requests


def median_step_ms(times: Sequence[float], steps: int) -> float:
    """The median of the timed steps, in milliseconds."""
    return statistics.median(times[-(steps + TAIL_STEPS) : -TAIL_STEPS]) * 1e3


def prompt(row: int, vocab_size: int) -> list[int]:
    """A prompt of token ids."""
    return [1 + (97 * row + i) % (vocab_size - 2) for i in range(PROMPT_TOKENS)]


def compare(
    plain: SteeredRowsOf, other: SteeredRowsOf, steps: int, vocab_size: int, count: int
) -> list[Round]:
    """Interleaved rounds of two batches."""
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
    """Profile some decode steps of a batch: device time (on a CPU host time) by kernel.

    A line has the kernel's name, its calls and microseconds per step; the longest come first.
    Steps are slower under the profiler: use shares and kernels, not step times.
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
