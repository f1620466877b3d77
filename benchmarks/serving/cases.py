"""The cases of serving, in legs interleaved with those of stock vLLM.

`vllm bench serve` measures servers side by side, one at a time: one is stock vLLM with the plugin
off, each kind of steering has one with a steer config. An idle server sleeps, so it costs only
memory. The lines:

    loaded    unsteered requests, server with LM-Steers
    steered   every request LM-steered, ``distinct`` steers in turn, same server
    idle      unsteered requests, server with a vector in every layer
    guided    every request guided in every layer, ``distinct`` strengths in turn, same server
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any

from benchmarks.rounds import Round, interleave, median, spread
from benchmarks.serving import vllm_bench
from benchmarks.serving.answers import ask_all, check_effect, check_equal
from benchmarks.serving.model import BASE, KINDS, ServedModel
from benchmarks.serving.processes import serving
from benchmarks.serving.vllm_bench import Figures, RequestLoad

STOCK = "stock"
UNSTEERED = {"steered": "loaded", "guided": "idle"}
Line = dict[str, Any]


@dataclass(frozen=True)
class Servers:
    """The addresses of the servers by kind, including ``stock``."""

    model: ServedModel
    urls: dict[str, str]
    folder: Path

    @classmethod
    def start(
        cls, stack: ExitStack, model: ServedModel, options: Sequence[str], folder: Path
    ) -> "Servers":
        """Start the servers in sequence, since each takes its memory from what is free; ``stack``
        ends them.
        """
        urls = {}
        for name in (STOCK, *KINDS):
            steer = [f"--steer-config={json.dumps(model.configs[name])}"] if name != STOCK else []
            flags = [f"--served-model-name={BASE}", *options, *steer]
            server = serving(model.folder, flags, folder / f"{name}.log", plugin=name != STOCK)
            urls[name] = stack.enter_context(server)
        return cls(model, urls, folder)

    def check(self, presets: int) -> None:
        """Check that unsteered answers equal stock vLLM and every preset changes every answer."""
        vocab_size = self.model.shape.vocab_size
        stock = ask_all(self.urls[STOCK], BASE, vocab_size)
        for kind in KINDS:
            ask = partial(ask_all, self.urls[kind], vocab_size=vocab_size)
            check_equal(stock, ask(BASE), UNSTEERED[kind])
            for name in self.model.models(kind, presets):
                check_effect(stock, ask(name), name)

    def lines(self, distinct: int, work: RequestLoad, repeats: int) -> Iterator[Line]:
        """The lines: one per kind, with and without steers."""

        def leg(server: str, presets: int) -> Figures:
            names = self.model.models(server, presets)
            where = (self.urls[server], self.model.folder)
            return vllm_bench.serve(*where, names, work, self.folder)

        legs = {case: partial(leg, *case) for case in product(KINDS, (0, distinct))}
        rounds = interleave(partial(leg, STOCK, 0), legs, repeats, warm_up=False)
        for (kind, presets), case_rounds in rounds.items():
            yield line(kind if presets else UNSTEERED[kind], presets, work, case_rounds)


def line(what: str, distinct: int, work: RequestLoad, rounds: Sequence[Round[Figures]]) -> Line:
    """A line with the median of each figure ``f``, and the spread ``f_ratio`` of the rounds'
    ratios.
    """
    row: Line = {"what": what, "distinct": distinct, **vars(work)}
    row["rounds"] = len(rounds)
    for figure in rounds[0].other:
        of = itemgetter(figure)
        row[figure] = median([of(one.other) for one in rounds])
        row |= spread(f"{figure}_ratio", [one.ratio(of) for one in rounds])
    return row
