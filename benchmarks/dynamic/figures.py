"""The figures of dynamic strength, each from interleaved legs.

cost      time per token over that of as many unsteered requests
ordinary  tokens per second of ordinary requests beside dynamic ones, over the same beside as
          many ordinary requests as the dynamic ones have streams
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.dynamic.served import DynamicLeg, DynamicModel, draw_prompts, run_leg
from benchmarks.rounds import interleave, median, plain_legs, spread

STREAMS = 3  # streams of a request with one dynamic strength: main, base and probe
STRENGTHS: dict[str, Any] = {
    "delta dynamic": {"delta": {"strength": "dynamic", "max": 2.0, "top_p": 0.5}},
    "lm dynamic": {"lm": {"strength": "dynamic", "max": 5.0, "top_p": 0.5}},
    "delta fixed": {"delta": 1.0},
}
DYNAMIC = STRENGTHS["delta dynamic"]
FLOOR = "two steps, three rows"
ORDINARY = 16


@dataclass
class DynamicBench:
    """An engine, the length of its requests, and the number of rounds."""

    name: str
    llm: Any
    served: DynamicModel
    tokens: int
    rounds: int
    legs: int = 0

    def leg(self, steers: Sequence[Any], *, again: bool = False) -> DynamicLeg:
        """Run a batch with new prompts, or with those of the last batch if ``again``."""
        self.legs += not again
        prompts = draw_prompts(self.legs, len(steers), self.served.vocab_size)
        return run_leg(self.llm, prompts, steers, self.tokens)

    def line(
        self, figure: str, label: str, requests: int, ratios: Sequence[float], **numbers: Any
    ) -> dict[str, Any]:
        """One line of the result."""
        head = {"model": self.name, "figure": figure, "what": label, "requests": requests}
        return head | numbers | spread("ratio", ratios) | {"rounds": len(ratios)}


def token_ms(leg: DynamicLeg) -> float:
    """The compared figure."""
    return leg.token_ms


def cost(bench: DynamicBench, requests: int) -> Iterator[dict[str, Any]]:
    """The time per token of each kind of strength, and the measured floor of two steps.

    The floor is the time of a step of ``requests`` rows and one of twice as many, both unsteered.
    """
    batches = {kind: [steer] * requests for kind, steer in STRENGTHS.items()}
    batches[FLOOR] = [None] * (2 * requests)
    legs = {kind: partial(bench.leg, steers) for kind, steers in batches.items()}
    rounds_by_kind = interleave(partial(bench.leg, [None] * requests), legs, bench.rounds)
    floors = [1 + pair.ratio(token_ms) for pair in rounds_by_kind[FLOOR]]
    for kind, rounds in rounds_by_kind.items():
        token_times, ratios = (
            [token_ms(pair.other) for pair in rounds],
            [pair.ratio(token_ms) for pair in rounds],
        )
        if kind == FLOOR:
            token_times, ratios = (
                [pair.plain(token_ms) + token_ms(pair.other) for pair in rounds],
                floors,
            )
        line = bench.line("cost", kind, requests, ratios)
        line["a_ms"] = median([leg.token_ms for leg in plain_legs(rounds)])
        line["b_ms"] = median(token_times)
        if kind == "delta dynamic":
            line["over_floor"] = median([a / b for a, b in zip(ratios, floors, strict=True)])
        yield line


def ordinary(bench: DynamicBench, dynamic: int) -> dict[str, Any]:
    """``ORDINARY`` ordinary requests beside ``dynamic`` ones, and beside as many streams.

    The first request is an ordinary one and is timed: it ends while the dynamic requests, which
    take twice as long, still run.
    """
    beside_ordinary = [None] * (ORDINARY + STREAMS * dynamic)
    beside_dynamic = [None] * ORDINARY + [DYNAMIC] * dynamic
    legs = [partial(bench.leg, steers) for steers in (beside_ordinary, beside_dynamic)]
    rounds = interleave(legs[0], {"dynamic": legs[1]}, bench.rounds)["dynamic"]
    return bench.line(
        "ordinary",
        f"{ORDINARY} beside {dynamic} dynamic",
        ORDINARY,
        [1 / pair.ratio(token_ms) for pair in rounds],
        a_ms=median([leg.token_ms for leg in plain_legs(rounds)]),
        b_ms=median([token_ms(pair.other) for pair in rounds]),
    )


def check_steered(bench: DynamicBench) -> None:
    """Check that every kind of strength changes its own text, and no text of another request."""
    steers = [None, *STRENGTHS.values()]
    plain = bench.leg([None] * len(steers)).tokens
    mixed = bench.leg(steers, again=True).tokens
    if plain[0] != mixed[0]:
        sys.exit(f"{bench.name}: an unsteered request was changed by its neighbours")
    for kind, before, after in zip(STRENGTHS, plain[1:], mixed[1:], strict=True):
        if before == after:
            sys.exit(f"{bench.name}: {kind} changed nothing")
