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
Asked = tuple[Any, Sequence[str | None]]  # an engine, and the steer of each row or None


@dataclass(frozen=True)
class Leg:
    """One batch: the median decode step in milliseconds, each row's tokens, and the sum of their
    log probabilities if the leg was asked for them."""

    step_ms: float
    tokens: tuple[tuple[int, ...], ...]
    logprobs: tuple[float, ...] = ()


def compare(plain: Asked, other: Asked, steps: int, vocab_size: int, count: int) -> list[Round]:
    """Rounds of two batches."""
    legs = [partial(run_leg, *asked, steps, vocab_size) for asked in (plain, other)]
    return interleave(legs[0], {"other": legs[1]}, count)["other"]


def step_ms(leg: Leg) -> float:
    """The figure that is compared."""
    return leg.step_ms


def step_columns(rounds: Sequence[Round[Leg]]) -> dict[str, float | int]:
    """Medians of both step times, and the spread of the rounds' ratios."""
    return {
        "unsteered_ms": median([leg.step_ms for leg in plain_legs(rounds)]),
        "steered_ms": median([one.other.step_ms for one in rounds]),
        **spread("ratio", [one.ratio(step_ms) for one in rounds], middle="_median"),
        "rounds": len(rounds),
    }


def run_leg(
    llm: Any, steers: Sequence[str | None], steps: int, vocab_size: int, *, logprobs: bool = False
) -> Leg:
    """Serve one batch, one row per entry of ``steers``, of ``steps`` timed steps."""
    engine = llm.llm_engine
    _add_requests(engine, steers, steps, vocab_size, logprobs=0 if logprobs else None)
    times, completions = [], {}
    while engine.has_unfinished_requests():
        start = perf_counter()
        outputs = engine.step()
        times.append(perf_counter() - start)
        completions.update({int(output.request_id): output.outputs[0] for output in outputs})
    assert len(completions) == len(steers), f"{len(completions)} of {len(steers)} rows came back"
    rows = [completions[row] for row in range(len(steers))]
    return Leg(
        step_ms=statistics.median(times[-(steps + TAIL_STEPS) : -TAIL_STEPS]) * 1e3,
        tokens=tuple(tuple(row.token_ids) for row in rows),
        logprobs=tuple(row.cumulative_logprob for row in rows) if logprobs else (),
    )


def profile_steps(
    llm: Any, steers: Sequence[str | None], steps: int, vocab_size: int
) -> list[dict[str, Any]]:
    """What runs in some decode steps of a batch: device time (on a CPU the host's) by kernel.

    A line has the kernel's name, its calls and microseconds per step; the longest come first.
    Under the profiler steps are slower: read shares and kernels, not step times.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    engine, on_card = llm.llm_engine, torch.cuda.is_available()
    _add_requests(engine, steers, steps, vocab_size)
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


def _add_requests(
    engine: Any, steers: Sequence[str | None], steps: int, vocab_size: int, **options: Any
) -> None:
    """The prompts are the same for every call."""
    for row, steer in enumerate(steers):
        prompt = [1 + (97 * row + i) % (vocab_size - 2) for i in range(PROMPT_TOKENS)]
        params = greedy(LEAD_STEPS + steps + TAIL_STEPS, steer, **options)
        engine.add_request(str(row), {"prompt_token_ids": prompt}, params)
