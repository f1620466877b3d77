"""`vllm bench throughput` and `vllm bench latency`, under a config that steers by default.

Each leg is a process of its own with an engine of its own. These benchmarks cannot ask for a
steer, so the config's ``default`` steers every request: always one steer, ``distinct`` is 1.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from serving import vllm_bench
from serving.answers import ANSWER_TOKENS, Answer, check_effect, check_equal, prompts
from serving.model import ServedModel
from serving.rounds import Figures, alternate, summary
from serving.vllm_bench import Work
from serving.vllm_process import run

MODES = ("throughput", "latency")
Leg = Callable[..., Figures]


def check_offline(
    model: ServedModel, options: dict[str, Any], kinds: Sequence[str], folder: Path
) -> None:
    """Under each config a request that does not ask is steered; one asking for none is as stock."""
    asked, found = folder / "asked.json", folder / "answers.json"
    what = {
        "model": str(model.folder),
        "options": options,
        "prompts": prompts(model.shape.vocab_size),
        "max_tokens": ANSWER_TOKENS,
        "configs": {kind: model.default_config(kind) for kind in kinds},
    }
    asked.write_text(json.dumps(what))
    script = Path(__file__).with_name("offline_answers.py")
    run([str(script), str(asked), str(found)], folder / "answers.log", plugin=False)
    answers = {name: read_answers(rows) for name, rows in json.loads(found.read_text()).items()}
    for kind in kinds:
        check_equal(answers["stock"], answers[f"{kind}, none"], f"{kind} by default, none asked")
        check_effect(answers["stock"], answers[kind], f"{kind} by default")


def read_answers(rows: Sequence[Any]) -> list[Answer]:
    """What ``offline_answers.py`` wrote."""
    return [Answer(tuple(tokens), tuple(logprobs)) for tokens, logprobs in rows]


def measure_mode(
    mode: str,
    model: ServedModel,
    flags: Sequence[str],
    kinds: Sequence[str],
    work: Work,
    *,
    iterations: int,
    repeats: int,
    folder: Path,
    tick: Callable[[str], Any],
) -> Iterator[dict[str, Any]]:
    """A row per kind."""
    bench: Leg = vllm_bench.throughput
    if mode == "latency":
        bench = partial(vllm_bench.latency, iterations=iterations)

    def leg(kind: str | None) -> Figures:
        tick(f"{mode}, {kind or 'stock'}")
        config = [f"--steer-config={json.dumps(model.default_config(kind))}"] if kind else []
        engine = [f"--model={model.folder}", *flags, *config]
        return bench(engine, work, folder=folder, plugin=kind is not None)

    legs = {kind: partial(leg, kind) for kind in kinds}
    chain = alternate(partial(leg, None), legs, repeats, between=len(kinds))
    for kind, rounds in chain.items():
        yield {
            "mode": mode,
            "what": kind,
            "distinct": 1,
            "concurrency": work.requests,
            "rate": None,
            **vars(work),
            **summary(rounds),
        }
