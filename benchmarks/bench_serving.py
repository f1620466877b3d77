"""What a steered vLLM costs as its users see it, measured by vLLM's own benchmarks.

    python benchmarks/bench_serving.py --json OUT [--shape gpt2-medium] [--rank 1000] ...

`vllm bench serve` measures servers (see ``serve_cases.py``), `vllm bench throughput` and
`vllm bench latency` engines (see ``offline_cases.py``), each on dummy weights and against stock
vLLM with the plugin off, in legs alternating with those of stock vLLM (see ``rounds.py``). Before
and after, answers are compared: unsteered ones are those of stock vLLM, steered ones differ.
"""

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import machine
import torch
from rich.console import Console
from serving import offline_cases
from serving.model import KINDS, SERVED_SHAPES, ServedModel, write_served_model
from serving.serve_cases import measure_load, serve_cases, start_servers
from serving.vllm_bench import Load, Work

MODES = ("serve", *offline_cases.MODES)
GPU_SHARE = 0.25  # of its memory, for each of three servers or engines
QUICK = {
    "distinct": [2],
    "concurrency": [4],
    "repeats": 1,
    "offline_repeats": 1,
    "between": 4,
    "iterations": 2,
    "requests": 8,
    "input_len": 8,
    "output_len": 8,
}


def main() -> None:
    """Parse, measure, write."""
    # An end by SIGTERM has to end the servers too: it becomes an exception.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    args = _arguments()
    result = {**machine.describe_run("serving"), **settings(args), "threads": None, "rows": []}
    console = Console(stderr=True)
    with (
        tempfile.TemporaryDirectory(prefix="bench-serving-") as folder,
        console.status("") as status,
    ):
        for rows, threads in measure(args, Path(folder), status.update):
            result["threads"] = result["threads"] or threads
            result["rows"] += rows
            write(result, args.json)  # what is done is kept if a later mode fails
            for row in rows:
                console.print(short(row))


def write(result: dict[str, Any], path: Path) -> None:
    """The result file so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def short(row: dict[str, Any]) -> str:
    """A row for whoever waits: its name and its ratios."""
    ratios = {key: value for key, value in row.items() if key.endswith("_ratio")}
    name = f"{row['mode']}, {row['what']}, {row['distinct']} distinct, "
    name += f"{row['concurrency']} at a time" if row["rate"] is None else f"{row['rate']} req/s"
    return f"{name}, over stock: {ratios}"


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What was asked of the run."""
    names = ("shape", "dtype", "rank", "repeats", "offline_repeats", "between", "iterations")
    return {name: getattr(args, name) for name in names}


def measure(
    args: argparse.Namespace, folder: Path, tick: Any
) -> Iterator[tuple[list[dict[str, Any]], int | None]]:
    """Rows as they are done, and the servers' threads where they are known."""
    presets = max(args.distinct)
    model = write_served_model(args.shape, folder, presets=presets, rank=args.rank)
    if "serve" in args.modes:
        yield from measure_servers(model, args, folder, tick)
    if offline := [mode for mode in args.modes if mode != "serve"]:
        tick("answers offline")
        options = engine_options(args) | {"distributed_executor_backend": "uni"}
        offline_cases.check_offline(model, options, args.kinds, folder)
        for mode in offline:
            yield measure_offline(mode, model, args, folder, tick), None


def measure_servers(
    model: ServedModel, args: argparse.Namespace, folder: Path, tick: Any
) -> Iterator[tuple[list[dict[str, Any]], int | None]]:
    """Start the servers, compare, measure every load, compare again."""
    cases = serve_cases(args.kinds, args.distinct)
    loads = [Load(concurrency=number) for number in args.concurrency]
    loads += [Load(rate=rate) for rate in args.rates]
    work = Work(args.requests, args.input_len, args.output_len)
    with ExitStack() as stack:
        tick("starting servers")
        servers = start_servers(stack, model, flags(engine_options(args)), args.kinds, folder)
        tick("answers of the servers")
        servers.check(max(args.distinct))
        for load in loads:
            legs = {"repeats": args.repeats, "between": args.between}
            rows = measure_load(servers, cases, load, work, **legs, tick=tick)
            yield [row | rank(row, args) for row in rows], servers.threads
        servers.check(max(args.distinct))


def measure_offline(
    mode: str, model: ServedModel, args: argparse.Namespace, folder: Path, tick: Any
) -> list[dict[str, Any]]:
    """Rows of one of the offline benchmarks: a batch is as large as the largest concurrency."""
    requests = args.requests if mode == "throughput" else max(args.concurrency)
    rows = offline_cases.measure_mode(
        mode,
        model,
        flags(engine_options(args)),
        offline_kinds(mode, args),
        Work(requests, args.input_len, args.output_len),
        iterations=args.iterations,
        repeats=args.offline_repeats,
        folder=folder,
        tick=tick,
    )
    return [row | rank(row, args) for row in rows]


def offline_kinds(mode: str, args: argparse.Namespace) -> list[str]:
    """All that were asked for; a quick run starts engines for one kind in each mode."""
    if not args.quick:
        return args.kinds
    return args.kinds[:1] if mode == "throughput" else args.kinds[-1:]


def rank(row: dict[str, Any], args: argparse.Namespace) -> dict[str, int]:
    """The rank of a row's steers, 0 where it has no LM-Steer."""
    return {"rank": args.rank if row["what"] == "steered" else 0}


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


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    count, counts = {"type": int, "metavar": "N"}, {"type": _counts, "metavar": "N,N,..."}
    add = parser.add_argument
    add("--json", type=Path, required=True, metavar="OUT", help="result file")
    add("--shape", choices=SERVED_SHAPES, default="gpt2-medium")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--rank", default=1000, **count)
    add(
        "--modes", type=_some(MODES), default=list(MODES), metavar="MODE,...", help=", ".join(MODES)
    )
    add(
        "--kinds", type=_some(KINDS), default=list(KINDS), metavar="KIND,...", help=", ".join(KINDS)
    )
    add("--distinct", default=[8], **counts, help="steers, for guidance strengths, in turn")
    add("--concurrency", default=[8], **counts, help="requests at a time")
    add("--rates", type=_rates, default=[], metavar="R,R,...", help="requests per second, as well")
    add("--requests", default=32, **count, help="per leg")
    add("--input-len", default=32, **count)
    add("--output-len", default=32, **count)
    add("--repeats", default=5, **count, help="rounds per case of serve")
    add("--between", default=1, **count, help="legs of cases between two legs of stock vLLM")
    add("--offline-repeats", default=3, **count, help="rounds of throughput and latency")
    add("--iterations", default=5, **count, help="batches per leg of latency")
    add("--quick", action="store_true", help="few short legs, no compilation: does it run at all")
    args = parser.parse_args()
    if args.quick:
        vars(args).update(QUICK)
    return args


def _counts(text: str) -> list[int]:
    numbers = sorted({int(part) for part in text.split(",")})
    if numbers[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: whole numbers from 1 are wanted, as in 1,4,32")
    return numbers


def _rates(text: str) -> list[float]:
    rates = sorted({float(part) for part in text.split(",")})
    if not 0 < rates[0] <= rates[-1] < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: positive numbers are wanted, as in 0.5,2")
    return rates


def _some(names: tuple[str, ...]) -> Any:
    def parse(text: str) -> list[str]:
        asked = text.split(",")
        if unknown := [name for name in asked if name not in names]:
            raise argparse.ArgumentTypeError(f"{unknown}: wanted are some of {', '.join(names)}")
        return [name for name in names if name in asked]

    return parse


if __name__ == "__main__":
    main()
