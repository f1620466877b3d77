"""What a steered vLLM costs as its users see it, measured by vLLM's own benchmarks.

    python -m benchmarks.bench_serving --json OUT [--shape gpt2-medium] [--rank 1000] ...

`vllm bench serve` measures servers, `vllm bench throughput` and `vllm bench latency` engines, each
on dummy weights and against stock vLLM with the plugin off (see ``serving/cases.py``). Before and
after, answers are compared: unsteered ones are those of stock vLLM, steered ones differ.
"""

import argparse
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from benchmarks import arguments
from benchmarks.result import Result, console
from benchmarks.serving import vllm_bench
from benchmarks.serving.cases import Offline, Servers
from benchmarks.serving.model import KINDS, SERVED_SHAPES, ServedModel, write_served_model
from benchmarks.serving.vllm_bench import Work

GPU_SHARE = 0.25  # of its memory, for each of three servers or engines
QUICK = {
    "distinct": 2,
    "concurrency": 4,
    "repeats": 1,
    "offline_repeats": 1,
    "iterations": 2,
    "requests": 8,
    "input_len": 8,
    "output_len": 8,
}


def main() -> None:
    """Parse, measure, write, print."""
    # An end by SIGTERM has to end the servers too: it becomes an exception.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    args = _arguments()
    names = ("shape", "dtype", "rank", "repeats", "offline_repeats", "iterations")
    result = Result("serving", args.json, **{name: getattr(args, name) for name in names})
    with tempfile.TemporaryDirectory(prefix="bench-serving-") as name:
        folder = Path(name)
        model = write_served_model(args.shape, folder, presets=args.distinct, rank=args.rank)
        for line in chain(
            measure_servers(model, args, folder, result), measure_offline(model, args, folder)
        ):
            add(line, args, result)
    result.show()


def add(line: dict[str, Any], args: argparse.Namespace, result: Result) -> None:
    """With the rank of its steers, 0 where it has no LM-Steer."""
    ratios = {key: value for key, value in line.items() if key.endswith("_ratio")}
    line["rank"] = args.rank if line["what"] == "steered" else 0
    result.add(line, f"{line['mode']}, {line['what']}, over stock: {ratios}")


def measure_servers(
    model: ServedModel, args: argparse.Namespace, folder: Path, result: Result
) -> Iterator[dict[str, Any]]:
    """Start the servers, compare, measure, compare again."""
    with ExitStack() as stack, console.status("servers"):
        servers = Servers.start(stack, model, engine_options(args), KINDS, folder)
        result.data["threads"] = servers.threads
        servers.check(args.distinct)
        work = Work(args.requests, args.input_len, args.output_len)
        yield from servers.lines(args.distinct, args.concurrency, work, args.repeats)
        servers.check(args.distinct)


def measure_offline(
    model: ServedModel, args: argparse.Namespace, folder: Path
) -> Iterator[dict[str, Any]]:
    """Compare, measure; a batch of `latency` is as large as the concurrency."""
    engines = Offline(model, engine_options(args), folder)
    latency = partial(vllm_bench.latency, iterations=args.iterations)
    # A quick run starts engines for one kind in each mode.
    first, last = (KINDS[:1], KINDS[1:]) if args.quick else (KINDS, KINDS)
    with console.status("engines"):
        engines.check(KINDS)
        for mode, bench, kinds, requests in (
            ("throughput", vllm_bench.throughput, first, args.requests),
            ("latency", latency, last, args.concurrency),
        ):
            work = Work(requests, args.input_len, args.output_len)
            yield from engines.lines(mode, bench, kinds, work, args.offline_repeats)


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of every engine here; all else is as vLLM sets it by default.

    No prefix cache: every leg sends the same prompts. Quick runs do not compile.
    """
    options = {"load_format": "dummy", "dtype": args.dtype, "enable_prefix_caching": False}
    if torch.cuda.is_available():
        options["gpu_memory_utilization"] = GPU_SHARE
    if args.quick:
        options |= {"enforce_eager": True, "distributed_executor_backend": "uni"}
    return options


def _arguments() -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    add, count = parser.add_argument, {"type": int, "metavar": "N"}
    add("--shape", choices=SERVED_SHAPES, default="gpt2-medium")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--rank", default=1000, **count)
    add("--distinct", default=8, **count, help="steers, for guidance strengths, in turn")
    add("--concurrency", default=8, **count, help="requests at a time")
    add("--requests", default=32, **count, help="per leg")
    add("--input-len", default=32, **count)
    add("--output-len", default=32, **count)
    add("--repeats", default=5, **count, help="rounds per case of serve")
    add("--offline-repeats", default=3, **count, help="rounds of throughput and latency")
    add("--iterations", default=5, **count, help="batches per leg of latency")
    add("--quick", action="store_true", help="few short legs, no compilation: does it run at all")
    args = parser.parse_args()
    if args.quick:
        vars(args).update(QUICK)
    return args


if __name__ == "__main__":
    main()
