"""Benchmark of a steered server with `vllm bench serve`.

    python -m benchmarks.bench_serving --json OUT [--shape gpt2-medium] [--rank 1000] ...

Servers on dummy weights are measured against stock vLLM with the plugin off (see
``serving/cases.py``). Before and after, answers are compared: unsteered answers must equal those of
stock vLLM, steered ones must differ.
"""

import argparse
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks import arguments
from benchmarks.dummy_model import SHAPES
from benchmarks.result import Result, console
from benchmarks.serving.cases import Servers
from benchmarks.serving.model import write_served_model
from benchmarks.serving.vllm_bench import RequestLoad

TOKENS = 32  # tokens of a prompt and of an answer
GPU_SHARE = 0.25  # share of GPU memory for each of three servers
QUICK = {"distinct": 2, "concurrency": 4, "repeats": 1, "requests": 8}


def main() -> None:
    """Parse, measure, write, print."""
    # SIGTERM must end the servers too, so it becomes an exception.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    args = _arguments()
    names = ("shape", "dtype", "rank", "repeats")
    result = Result("serving", args.json, **{name: getattr(args, name) for name in names})
    with tempfile.TemporaryDirectory(prefix="bench-serving-") as folder:
        measure(args, Path(folder), result)
    result.show()


def measure(args: argparse.Namespace, folder: Path, result: Result) -> None:
    """Start the servers, compare, measure, compare again."""
    model = write_served_model(args.shape, folder, presets=args.distinct, rank=args.rank)
    work = RequestLoad(args.requests, TOKENS, TOKENS, args.concurrency)
    with ExitStack() as stack, console.status("servers"):
        servers = Servers.start(stack, model, engine_flags(args), folder)
        servers.check(args.distinct)
        for line in servers.lines(args.distinct, work, args.repeats):
            line["rank"] = args.rank if line["what"] == "steered" else 0
            result.add(line, f"{line['what']}, tokens/s over stock: {line['tok_per_s_ratio']}")
        servers.check(args.distinct)


def engine_flags(args: argparse.Namespace) -> list[str]:
    """Arguments of every server here; all others have the defaults of vLLM.

    No prefix cache: every leg sends the same prompts. Quick runs do not compile.
    """
    flags = ["--load-format=dummy", f"--dtype={args.dtype}", "--no-enable-prefix-caching"]
    if torch.cuda.is_available():
        flags.append(f"--gpu-memory-utilization={GPU_SHARE}")
    if args.quick:
        flags += ["--enforce-eager", "--distributed-executor-backend=uni"]
    return flags


def _arguments() -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    add, count = parser.add_argument, {"type": int, "metavar": "N"}
    add("--shape", choices=SHAPES, default="gpt2-medium")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--rank", default=1000, **count)
    add("--distinct", default=8, **count, help="steers, for guidance strengths, in turn")
    add("--concurrency", default=8, **count, help="requests at a time")
    add("--requests", default=32, **count, help="per leg")
    add("--repeats", default=5, **count, help="rounds per case")
    add("--quick", action="store_true", help="few short legs, no compilation: does it run at all")
    args = parser.parse_args()
    if args.quick:
        vars(args).update(QUICK)
    return args


if __name__ == "__main__":
    main()
