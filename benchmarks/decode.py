"""Decode steps of an engine in this process, and the ratio of two kinds of them.

A *leg* serves one batch from its prompts to its last tokens and times every engine step. All
requests start together and end together; steps of the prefill and the first and last decode steps
are left out, so each step counted is pure decode of the whole batch. A leg's step time is the
median of its steps: a step that another process disturbed does not move it, which the difference
quotient of two output lengths cannot offer.

A *round* is three legs A / B / A; its ratio is ``B / ((A before + A after) / 2)``, which takes out
a drift of the machine. Neighbouring rounds share an A.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

PROMPT_TOKENS = 8
LEAD_STEPS = 4
TAIL_STEPS = 2


@dataclass(frozen=True)
class Leg:
    """One batch: the median decode step in milliseconds, each row's tokens, and the sum of their
    log probabilities if the leg was asked for them."""

    step_ms: float
    tokens: tuple[tuple[int, ...], ...]
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Legs of B between legs of A, as one longer chain A B A B ... A."""

    plain: tuple[Leg, ...]
    other: tuple[Leg, ...]

    @property
    def ratios(self) -> list[float]:
        """One ratio per round."""
        sides = zip(self.plain, self.plain[1:], strict=False)
        means = [(before.step_ms + after.step_ms) / 2 for before, after in sides]
        return [leg.step_ms / mean for leg, mean in zip(self.other, means, strict=True)]

    def summary(self) -> dict[str, float | int]:
        """Medians of both step times, and median, p20 and p80 of the rounds' ratios."""
        ratios = sorted(self.ratios)
        return {
            "unsteered_ms": round(statistics.median(leg.step_ms for leg in self.plain), 4),
            "steered_ms": round(statistics.median(leg.step_ms for leg in self.other), 4),
            "ratio_median": round(statistics.median(ratios), 4),
            "ratio_p20": round(quantile(ratios, 0.2), 4),
            "ratio_p80": round(quantile(ratios, 0.8), 4),
            "rounds": len(ratios),
        }


def compare(
    plain: Callable[[], Leg], other: Callable[[], Leg], rounds: int, tick: Callable[[], Any]
) -> Comparison:
    """Run both once to warm up, then the chain; ``tick`` is called after each leg."""
    plain(), other()
    firsts, others = [plain()], []
    for _ in range(rounds):
        others.append(other())
        tick()
        firsts.append(plain())
        tick()
    return Comparison(tuple(firsts), tuple(others))


def run_leg(
    llm: Any, steers: Sequence[str | None], steps: int, vocab_size: int, *, logprobs: bool = False
) -> Leg:
    """Serve one batch, one row per entry of ``steers`` (None: no steer), of ``steps`` timed steps.

    Greedy, no end of text, no detokenising; the prompts are the same for every call.
    """
    engine = llm.llm_engine
    wanted = LEAD_STEPS + steps + TAIL_STEPS
    for row, steer in enumerate(steers):
        params = _params(wanted, steer, logprobs=logprobs)
        engine.add_request(str(row), _prompt(row, vocab_size), params)
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
    for row, steer in enumerate(steers):
        params = _params(LEAD_STEPS + steps + TAIL_STEPS, steer, logprobs=False)
        engine.add_request(str(row), _prompt(row, vocab_size), params)
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


def _prompt(row: int, vocab_size: int) -> dict[str, list[int]]:
    return {
        "prompt_token_ids": [1 + (97 * row + i) % (vocab_size - 2) for i in range(PROMPT_TOKENS)]
    }


def _params(max_tokens: int, steer: str | None, *, logprobs: bool) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        logprobs=0 if logprobs else None,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={"steer": steer} if steer else None,
    )


def quantile(ordered: Sequence[float], share: float) -> float:
    """Linear interpolation between the two nearest values."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
