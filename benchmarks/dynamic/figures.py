"""The three figures of dynamic strength, each from interleaved legs, beside what counting predicts.

cost      time of a token over that of as many unsteered requests
loop      the authors' loop's time of a token over ours
ordinary  tokens per second of ordinary requests beside dynamic ones, over the same beside as
          many ordinary requests as the dynamic ones have streams
"""

import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

from benchmarks.dynamic import counting
from benchmarks.dynamic.counting import STREAMS
from benchmarks.dynamic.legs import PROMPT_TOKENS, Leg, Prompts, run_leg
from benchmarks.dynamic.loop import AuthorsLoop, Written
from benchmarks.dynamic.models import Served
from benchmarks.rounds import Round, interleave, median, plain_legs, spread

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

    def line(
        self, figure: str, what: str, requests: int, ratios: Sequence[float], **numbers: Any
    ) -> dict[str, Any]:
        """One line of the result."""
        head = {"model": self.name, "figure": figure, "what": what, "requests": requests}
        ratios = list(ratios)
        return head | numbers | spread("ratio", ratios) | {"ratios": ratios, "rounds": len(ratios)}


def token_ms(leg: Leg) -> float:
    """The figure that is compared."""
    return leg.token_ms


def cost(bench: Bench, requests: int) -> Iterator[dict[str, Any]]:
    """The time of a token of each kind of strength, and the floor of two steps measured.

    The floor is the time of a step of ``requests`` rows and one of twice as many, both unsteered.
    """
    batches = {kind: [steer] * requests for kind, steer in STRENGTHS.items()}
    batches[FLOOR] = [None] * (STREAMS * requests)
    legs = {kind: partial(bench.leg, steers) for kind, steers in batches.items()}
    found = interleave(partial(bench.leg, [None] * requests), legs, bench.rounds)
    floors = [1 + one.ratio(token_ms) for one in found[FLOOR]]
    for kind, rounds in found.items():
        own, ratios = _own(rounds), [one.ratio(token_ms) for one in rounds]
        if kind == FLOOR:
            own, ratios = [one.plain(token_ms) + token_ms(one.other) for one in rounds], floors
        delta = kind == "delta dynamic"
        over_floor = [ratio / floor for ratio, floor in zip(ratios, floors, strict=True)]
        yield bench.line(
            "cost",
            kind,
            requests,
            ratios,
            a_ms=median([leg.token_ms for leg in plain_legs(rounds)]),
            b_ms=median(own),
            predicted=counting.of_request(kind, bench.served.head_share),
            over_floor=median(over_floor) if delta else None,
            goal=ALONE_GOAL if delta and requests == 1 else None,
        )


def loop(bench: Bench, requests: int, loop_requests: int) -> dict[str, Any]:
    """The authors' loop over ``requests`` requests at once; from prompt to last token, both.

    ``loop_requests`` of them go through the loop, whose time of a token does not depend on how
    many it does one after the other. What it writes has to be what the engine wrote.
    """
    authors = AuthorsLoop(bench.served.folder, bench.served.delta, maximum=MAXIMUM, top_p=TOP_P)
    asked = [DYNAMIC] * requests
    authors.write(bench.prompts[0], 2)
    bench.leg(asked)
    theirs, ours, same = [], [], []
    for _ in range(min(bench.rounds, LOOP_ROUNDS)):
        before, start = bench.leg(asked), perf_counter()
        written = [authors.write(bench.prompts[row], bench.tokens) for row in range(loop_requests)]
        theirs.append((perf_counter() - start) * 1e3 / (loop_requests * bench.tokens))
        same += [same_share(*pair) for pair in zip(before.tokens, written, strict=False)]
        seconds = (before.seconds + bench.leg(asked).seconds) / 2
        ours.append(seconds * 1e3 / (requests * bench.tokens))
    return bench.line(
        "loop",
        "authors' loop over ours",
        requests,
        [a / b for a, b in zip(theirs, ours, strict=True)],
        a_ms=median(theirs),
        b_ms=median(ours),
        predicted=counting.of_loop(requests, PROMPT_TOKENS, bench.tokens),
        loop_requests=loop_requests,
        equal_tokens=statistics.mean(same),
        goal=LOOP_GOAL if requests > 1 else None,
    )


def ordinary(bench: Bench, dynamic: int) -> dict[str, Any]:
    """``ORDINARY`` ordinary requests beside ``dynamic`` ones, and beside as many streams."""
    beside_ordinary = [None] * (ORDINARY + (1 + STREAMS) * dynamic)
    beside_dynamic = [None] * ORDINARY + [DYNAMIC] * dynamic
    legs = [partial(bench.leg, asked, ORDINARY) for asked in (beside_ordinary, beside_dynamic)]
    rounds = interleave(legs[0], {"dynamic": legs[1]}, bench.rounds)["dynamic"]
    return bench.line(
        "ordinary",
        f"{ORDINARY} beside {dynamic} dynamic",
        ORDINARY,
        [1 / one.ratio(token_ms) for one in rounds],
        a_ms=median([leg.token_ms for leg in plain_legs(rounds)]),
        b_ms=median(_own(rounds)),
        predicted=counting.of_ordinary(ORDINARY, dynamic),
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


def same_share(engine: Sequence[int], loop: Written) -> float:
    """The share of a text before the two part; they may where two tokens are as likely."""
    for step, (mine, theirs) in enumerate(zip(engine, loop.tokens, strict=True)):
        if mine != theirs:
            if loop.margins[step] > MARGIN:
                sys.exit(f"engine and loop differ at token {step}: {mine}, {theirs}")
            return step / len(engine)
    return 1.0


def _own(rounds: Sequence[Round[Leg]]) -> list[float]:
    return [token_ms(one.other) for one in rounds]
