"""Benchmark of dynamic strength, in one process and run.

    python -m benchmarks.dynamic_cost --json OUT [--models embedded,llama] [--rounds N] ...

Engines of this process serve requests of a fixed number of greedy tokens;
``dynamic/figures.py`` defines the figures.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import arguments
from benchmarks.dynamic.figures import (
    ORDINARY,
    STREAMS,
    DynamicBench,
    check_steered,
    cost,
    ordinary,
)
from benchmarks.dynamic.served import NAMES, PROMPT_TOKENS, DynamicModel, write_dynamic_model
from benchmarks.engines import make_engine, set_environment
from benchmarks.result import Result

ROUNDS = {"embedded": 15, "llama": 5}  # legs of a fast model are short, and noisier


def main() -> None:
    """Parse, measure, write, print."""
    set_environment()
    args = _arguments()
    settings = {"dtype": "float32", "prompt_tokens": PROMPT_TOKENS, "tokens": args.tokens}
    result = Result("dynamic_cost", args.json, **settings)
    with tempfile.TemporaryDirectory(prefix="dynamic-cost-") as folder:
        for name in args.models:
            served = write_dynamic_model(name, Path(folder) / name, steps=args.tokens)
            for line in measure(name, served, args):
                words = (
                    "{model}, {what}, {requests}: {ratio:.2f} ({ratio_p20:.2f} to {ratio_p80:.2f})"
                )
                result.add(line, words.format(**line))
    result.write(threads=torch.get_num_threads())
    result.show()


def measure(name: str, served: DynamicModel, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The lines of one model, its texts checked before and after."""
    llm = make_engine(
        served.folder,
        served.config,
        dtype="float32",
        max_num_seqs=max(STREAMS * args.requests, ORDINARY + STREAMS * max(args.dynamic)),
        enable_prefix_caching=True,  # vLLM's default; streams share their prompt
    )
    rounds = args.rounds or ROUNDS[name]
    bench = DynamicBench(name, llm, served, args.tokens, rounds)
    check_steered(bench)
    for requests in (1, args.requests):
        yield from cost(bench, requests)
    for dynamic in args.dynamic:
        yield ordinary(bench, dynamic)
    check_steered(bench)


def _arguments() -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    add = parser.add_argument
    arguments.add_names(parser, "--models", NAMES)
    add("--rounds", type=int, help="of each figure; by the model without it")
    add("--quick", action="store_true", help="few requests and rounds: does it run at all")
    args = parser.parse_args()
    args.tokens, args.requests, args.dynamic = 30, 16, [1, 2, 4]
    if args.quick:
        args.tokens, args.requests, args.dynamic = 10, 2, [1]
        args.models, args.rounds = ["embedded"], 2
    return args


if __name__ == "__main__":
    main()
