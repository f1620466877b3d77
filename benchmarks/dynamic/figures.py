"""The three figures of dynamic strength, each from legs interleaved A / B / A.

cost      time of a token over that of as many unsteered requests
loop      the authors' loop's time of a token over ours
ordinary  tokens per second of ordinary requests beside dynamic ones, over the same beside as
          many ordinary requests as the dynamic ones have streams
"""

import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

from decode import quantile

from dynamic import counting
from dynamic.legs import PROMPT_TOKENS, Leg, Prompts, run_leg
from dynamic.loop import AuthorsLoop, Written
from dynamic.models import Served

MAXIMUM, TOP_P = 2.0, 0.5
STRENGTHS: dict[str, Any] = {
    "delta dynamic": {"delta": {"strength": "dynamic", "max": MAXIMUM, "top_p": TOP_P}},
    "lm dynamic": {"lm": {"strength": "dynamic", "max": 5.0, "top_p": TOP_P}},
    "delta fixed": {"delta": 1.0},
}
DYNAMIC = STRENGTHS["delta dynamic"]
FLOOR = "two steps, three rows"
ALONE_GOAL, LOOP_GOAL, ORDINARY_GOAL = "<= 2.4", ">= 10", ">= 1"
ORDINARY = 16
LOOP_ROUNDS = 3
MARGIN = 1e-2  # below that the rounding of a float32 forward pass may choose the other token
STREAMS = 1 + counting.STREAMS


@dataclass
class Bench:
    """One engine, its prompts, how long its requests are, and how often all of it is measured."""

    name: str
    llm: Any
    served: Served
    prompts: Prompts
    tokens: int
    rounds: int

    def leg(self, steers: Sequence[Any], counted: int | None = None) -> Leg:
        """A batch with new prompts."""
        return run_leg(self.llm, self.prompts.next_leg(), steers, self.tokens, counted=counted)

    def line(self, figure: str, what: str, requests: int, **numbers: Any) -> dict[str, Any]:
        """One line of the result."""
        return {"model": self.name, "figure": figure, "what": what, "requests": requests, **numbers}


def cost(bench: Bench, requests: int) -> Iterator[dict[str, Any]]:
    """The time of a token of each kind of strength, and the floor of two steps measured.

    The floor is the time of a step of ``requests`` rows and one of twice as many, both unsteered.
    """
    batches = {kind: [steer] * requests for kind, steer in STRENGTHS.items()}
    batches[FLOOR] = [None] * (counting.STREAMS * requests)
    legs = {kind: partial(bench.leg, steers) for kind, steers in batches.items()}
    unsteered, others = interleaved(lambda: bench.leg([None] * requests), legs, bench.rounds)
    beside = {kind: [mean for mean, _ in pairs] for kind, pairs in others.items()}
    times = {kind: [leg.token_ms for _, leg in pairs] for kind, pairs in others.items()}
    times[FLOOR] = [a + b for a, b in zip(beside[FLOOR], times[FLOOR], strict=True)]
    floors = _ratios(times[FLOOR], beside[FLOOR])
    for kind, own in times.items():
        ratios = _ratios(own, beside[kind])
        over_floor = _ratios(ratios, floors) if kind == "delta dynamic" else None
        counted_as = "delta dynamic" if kind == FLOOR else kind
        yield bench.line(
            "cost",
            kind,
            requests,
            a_ms=statistics.median(unsteered),
            b_ms=statistics.median(own),
            **_spread(ratios),
            predicted=list(counting.of_request(counted_as, bench.served.head_share)),
            over_floor=statistics.median(over_floor) if over_floor else None,
            goal=ALONE_GOAL if kind == "delta dynamic" and requests == 1 else None,
        )


def loop(bench: Bench, requests: int, loop_requests: int) -> dict[str, Any]:
    """The authors' loop over ``requests`` requests at once; from prompt to last token, both.

    ``loop_requests`` of them go through the loop, whose time of a token does not depend on how
    many it does one after the other. What it writes has to be what the engine wrote.
    """
    authors = AuthorsLoop(bench.served.folder, bench.served.delta, maximum=MAXIMUM, top_p=TOP_P)
    authors.write(bench.prompts[0], 2)
    bench.leg([DYNAMIC] * requests)
    theirs, ours, ratios, same = [], [], [], []
    for _ in range(min(bench.rounds, LOOP_ROUNDS)):
        before = bench.leg([DYNAMIC] * requests)
        start = perf_counter()
        written = [authors.write(bench.prompts[row], bench.tokens) for row in range(loop_requests)]
        theirs.append((perf_counter() - start) * 1e3 / (loop_requests * bench.tokens))
        same += [same_share(*pair) for pair in zip(before.tokens, written, strict=False)]
        after = bench.leg([DYNAMIC] * requests)
        seconds = (before.seconds + after.seconds) / 2
        ours.append(seconds * 1e3 / (requests * bench.tokens))
        ratios.append(theirs[-1] / ours[-1])
    return bench.line(
        "loop",
        "authors' loop over ours",
        requests,
        a_ms=statistics.median(theirs),
        b_ms=statistics.median(ours),
        **_spread(ratios),
        predicted=list(counting.of_loop(requests, PROMPT_TOKENS, bench.tokens)),
        loop_requests=loop_requests,
        equal_tokens=statistics.mean(same),
        goal=LOOP_GOAL if requests > 1 else None,
    )


def ordinary(bench: Bench, dynamic: int) -> dict[str, Any]:
    """``ORDINARY`` ordinary requests beside ``dynamic`` ones, and beside as many streams."""
    beside_ordinary = [None] * (ORDINARY + STREAMS * dynamic)
    beside_dynamic = [None] * ORDINARY + [DYNAMIC] * dynamic
    unsteered, others = interleaved(
        lambda: bench.leg(beside_ordinary, counted=ORDINARY),
        {"dynamic": lambda: bench.leg(beside_dynamic, counted=ORDINARY)},
        bench.rounds,
    )
    means, legs = zip(*others["dynamic"], strict=True)
    own = [leg.token_ms for leg in legs]
    return bench.line(
        "ordinary",
        f"{ORDINARY} beside {dynamic} dynamic",
        ORDINARY,
        a_ms=statistics.median(unsteered),
        b_ms=statistics.median(own),
        **_spread(_ratios(means, own)),
        predicted=list(counting.of_ordinary(ORDINARY, dynamic)),
        goal=ORDINARY_GOAL,
    )


def check_steered(bench: Bench) -> None:
    """Every kind of strength changes what is written, and no strength what others write."""
    prompts = bench.prompts.next_leg()
    steers = [None, *STRENGTHS.values()]
    plain, mixed = (
        run_leg(bench.llm, prompts, asked, bench.tokens).tokens
        for asked in ([None] * len(steers), steers)
    )
    if plain[0] != mixed[0]:
        sys.exit(f"{bench.name}: an unsteered request was changed by its neighbours")
    for kind, before, after in zip(STRENGTHS, plain[1:], mixed[1:], strict=True):
        if before == after:
            sys.exit(f"{bench.name}: {kind} changed nothing")


def interleaved(
    plain: Callable[[], Leg], others: Mapping[str, Callable[[], Leg]], rounds: int
) -> tuple[list[float], dict[str, list[tuple[float, Leg]]]]:
    """The times of the plain legs, and by kind its legs with the mean of the plain ones around."""
    for warm_up in (plain, *others.values()):
        warm_up()
    times = [plain().token_ms]
    found: dict[str, list[tuple[float, Leg]]] = {kind: [] for kind in others}
    for _ in range(rounds):
        for kind, other in others.items():
            leg = other()
            times.append(plain().token_ms)
            found[kind].append(((times[-2] + times[-1]) / 2, leg))
    return times, found


def same_share(engine: Sequence[int], loop: Written) -> float:
    """The share of a text before the two part; they may where two tokens are as likely."""
    for step, (mine, theirs) in enumerate(zip(engine, loop.tokens, strict=True)):
        if mine != theirs:
            if loop.margins[step] > MARGIN:
                sys.exit(f"engine and loop differ at token {step}: {mine}, {theirs}")
            return step / len(engine)
    return 1.0


def _ratios(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(first, second, strict=True)]


def _spread(ratios: Sequence[float]) -> dict[str, Any]:
    low, middle, high = (quantile(sorted(ratios), share) for share in (0.2, 0.5, 0.8))
    return {
        "ratio": middle,
        "ratio_p20": low,
        "ratio_p80": high,
        "ratios": list(ratios),
        "rounds": len(ratios),
    }
