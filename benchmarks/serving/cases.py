"""The cases of serving, each in legs that alternate with those of stock vLLM.

`vllm bench serve` measures servers side by side, one at a time: one is stock vLLM with the plugin
off, each kind of steering has one with a steer config. An idle server sleeps, so it costs the
measured one memory only. Its lines:

    loaded    unsteered requests, server with LM-Steers
    steered   every request LM-steered, ``distinct`` steers in turn, same server
    idle      unsteered requests, server with a vector in every layer
    guided    every request guided in every layer, ``distinct`` strengths in turn, same server

`vllm bench throughput` and `latency` start an engine for every leg. They cannot ask for a steer, so
the config's ``default`` steers every request: always one steer, ``distinct`` is 1.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.processes import in_own_process
from benchmarks.rounds import Round, interleave, median, spread
from benchmarks.serving import vllm_bench
from benchmarks.serving.answers import ask_all, check_effect, check_equal, of_engines
from benchmarks.serving.model import BASE, ServedModel
from benchmarks.serving.processes import serving
from benchmarks.serving.vllm_bench import Figures, Work

STOCK = "stock"
UNSTEERED = {"steered": "loaded", "guided": "idle"}
Line = dict[str, Any]


@dataclass(frozen=True)
class Servers:
    """The addresses by kind, ``stock`` among them."""

    model: ServedModel
    urls: dict[str, str]
    folder: Path

    @classmethod
    def start(
        cls,
        stack: ExitStack,
        model: ServedModel,
        options: dict[str, Any],
        kinds: Sequence[str],
        folder: Path,
    ) -> "Servers":
        """One after the other, for each takes its memory from what is free; ``stack`` ends them."""
        urls = {}
        for name in (STOCK, *kinds):
            steer = [f"--steer-config={json.dumps(model.configs[name])}"] if name != STOCK else []
            spelled = [f"--served-model-name={BASE}", *flags(options), *steer]
            server = serving(model.folder, spelled, folder / f"{name}.log", plugin=name != STOCK)
            urls[name] = stack.enter_context(server)
        return cls(model, urls, folder)

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

    def lines(self, distinct: int, concurrency: int, work: Work, repeats: int) -> Iterator[Line]:
        """A line per kind, without steers and with them."""

        def leg(server: str, presets: int) -> Figures:
            names = self.model.models(server, presets)
            where = (self.urls[server], self.model.folder)
            return vllm_bench.serve(*where, names, concurrency, work, self.folder)

        kinds = [name for name in self.urls if name != STOCK]
        legs = {case: partial(leg, *case) for case in product(kinds, (0, distinct))}
        rounds = interleave(partial(leg, STOCK, 0), legs, repeats, warm_up=False)
        for (kind, presets), found in rounds.items():
            what = kind if presets else UNSTEERED[kind]
            yield line("serve", what, presets, concurrency, work, found)


@dataclass(frozen=True)
class Offline:
    """Engines of `vllm bench`, each with ``options``, and files in ``folder``."""

    model: ServedModel
    options: dict[str, Any]
    folder: Path

    def check(self, kinds: Sequence[str]) -> None:
        """Under each config requests that do not ask are steered; those asking for none are as
        stock vLLM's.
        """
        configs = {kind: self.model.default_config(kind) for kind in kinds}
        own = {"distributed_executor_backend": "uni", "max_num_seqs": 8}
        asked = (self.model.folder, self.model.shape.vocab_size, self.options | own, configs)
        answers = in_own_process(of_engines, *asked)
        for kind in kinds:
            check_equal(answers[STOCK], answers[f"{kind}, none"], f"{kind} by default, none asked")
            check_effect(answers[STOCK], answers[kind], f"{kind} by default")

    def lines(
        self,
        mode: str,
        bench: Callable[..., Figures],
        kinds: Sequence[str],
        work: Work,
        repeats: int,
    ) -> Iterator[Line]:
        """A line per kind."""

        def leg(kind: str | None) -> Figures:
            engine = [f"--model={self.model.folder}", *flags(self.options)]
            if kind:
                engine.append(f"--steer-config={json.dumps(self.model.default_config(kind))}")
            return bench(engine, work, folder=self.folder, plugin=kind is not None)

        legs = {kind: partial(leg, kind) for kind in kinds}
        rounds = interleave(partial(leg, None), legs, repeats, warm_up=False)
        for kind, found in rounds.items():
            yield line(mode, kind, 1, work.requests, work, found)


def line(
    mode: str,
    what: str,
    distinct: int,
    concurrency: int,
    work: Work,
    rounds: Sequence[Round[Figures]],
) -> Line:
    """Of each figure ``f`` the medians ``f`` and ``f_stock``, and the spread ``f_ratio`` of the
    rounds' ratios.
    """
    found: Line = {"mode": mode, "what": what, "distinct": distinct, "concurrency": concurrency}
    found |= {**vars(work), "rounds": len(rounds)}
    for figure in rounds[0].other:
        of = partial(_figure, figure)
        found[figure] = median([of(one.other) for one in rounds])
        found[f"{figure}_stock"] = median([one.plain(of) for one in rounds])
        found |= spread(f"{figure}_ratio", [one.ratio(of) for one in rounds])
    return found


def _figure(name: str, leg: Figures) -> float:
    return leg[name]


def bound_cores(log: str) -> int | None:
    """How many cores a server's log says its (first) worker is bound to."""
    found = re.search(r"local_rank=0, core ids=\[([\d, ]+)\]", log)
    return len(found[1].split(",")) if found else None


def flags(options: dict[str, Any]) -> list[str]:
    """Engine arguments as flags of the command line."""
    spelled = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            spelled.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            spelled.append(f"--{flag}={value}")
    return spelled
