"""Servers side by side, measured one at a time by `vllm bench serve`.

One server is stock vLLM with the plugin off; each kind of steering has one with a steer config. An
idle server sleeps, so it costs the measured one memory only. Rows of the result:

    loaded    unsteered requests, server with LM-Steers
    steered   every request LM-steered, ``distinct`` steers in turn, same server
    idle      unsteered requests, server with a vector in every layer
    guided    every request guided in every layer, ``distinct`` strengths in turn, same server
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from serving import vllm_bench
from serving.answers import ask_all, check_effect, check_equal
from serving.model import BASE, ServedModel
from serving.rounds import Figures, alternate, summary
from serving.server import serving
from serving.vllm_bench import Load, Work

STOCK = "stock"
UNSTEERED = {"steered": "loaded", "guided": "idle"}


@dataclass(frozen=True)
class ServeCase:
    """Requests to the server of ``kind``: ``distinct`` presets in turn, or 0 for no steer."""

    kind: str
    distinct: int

    @property
    def what(self) -> str:
        """The row's name."""
        return self.kind if self.distinct else UNSTEERED[self.kind]


def serve_cases(kinds: Sequence[str], distinct: Sequence[int]) -> list[ServeCase]:
    """Each kind without a steer and with each number of presets."""
    return [ServeCase(kind, number) for kind in kinds for number in (0, *distinct)]


@dataclass(frozen=True)
class Servers:
    """The addresses by kind, ``stock`` among them."""

    model: ServedModel
    urls: dict[str, str]
    folder: Path

    @property
    def threads(self) -> int | None:
        """Cores that vLLM bound the stock server's worker to; None where its log does not say."""
        return bound_cores((self.folder / f"{STOCK}.log").read_text(errors="replace"))

    def check(self, presets: int) -> None:
        """Unsteered answers are those of stock vLLM; every preset changes every answer."""
        vocab_size = self.model.shape.vocab_size
        stock = ask_all(self.urls[STOCK], BASE, vocab_size)
        for kind in self.urls.keys() - {STOCK}:
            ask = partial(ask_all, self.urls[kind], vocab_size=vocab_size)
            check_equal(stock, ask(BASE), UNSTEERED[kind])
            for name in self.model.models(kind, presets):
                check_effect(stock, ask(name), name)

    def leg(self, server: str, distinct: int, load: Load, work: Work) -> Figures:
        """One leg on one server."""
        names = self.model.models(server, distinct)
        return vllm_bench.serve(
            self.urls[server], self.model.folder, names, load, work, self.folder
        )


def start_servers(
    stack: ExitStack, model: ServedModel, flags: Sequence[str], kinds: Sequence[str], folder: Path
) -> Servers:
    """One after the other, for each takes its memory from what is free; ``stack`` ends them."""
    urls = {}
    for name in (STOCK, *kinds):
        steer = [f"--steer-config={json.dumps(model.configs[name])}"] if name != STOCK else []
        options = [f"--served-model-name={BASE}", *flags, *steer]
        log = folder / f"{name}.log"
        server = serving(model.folder, options, log, plugin=name != STOCK)
        urls[name] = stack.enter_context(server)
    return Servers(model, urls, folder)


def measure_load(
    servers: Servers,
    cases: Sequence[ServeCase],
    load: Load,
    work: Work,
    *,
    repeats: int,
    between: int,
    tick: Callable[[str], Any],
) -> Iterator[dict[str, Any]]:
    """A row per case, under one load."""

    def leg(server: str, distinct: int, what: str) -> Figures:
        tick(f"serve, {what}, {load}")
        return servers.leg(server, distinct, load, work)

    legs = {case: partial(leg, case.kind, case.distinct, case.what) for case in cases}
    stock = partial(leg, STOCK, 0, STOCK)
    for case, rounds in alternate(stock, legs, repeats, between=between).items():
        yield {
            "mode": "serve",
            "what": case.what,
            "distinct": case.distinct,
            "concurrency": load.concurrency,
            "rate": load.rate,
            **vars(work),
            **summary(rounds),
        }


def bound_cores(log: str) -> int | None:
    """How many cores a server's log says its (first) worker is bound to."""
    found = re.search(r"local_rank=0, core ids=\[([\d, ]+)\]", log)
    return len(found[1].split(",")) if found else None
