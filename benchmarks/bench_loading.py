"""What loading steers costs the requests that run: ``python -m benchmarks.bench_loading``.

``load``: a server decodes 16 requests without end while steers of one rank are loaded and unloaded
over HTTP. A step is the time between two tokens of one of the requests, as a client sees it. The
time of a load is that of its HTTP request. The steps during each load are compared with those of
the ``BESIDE_S`` seconds before and after it, as steps get longer with the texts: A B A.

``room``: decode steps of engines in this process, made in this order: two without room, two with
room for steers that are loaded later and nothing loaded, and again one without. The fifth and the
second are controls: engines of one kind differ by some percent, by when they were made. Without a
steer, and with one steer of the config on each row.
"""

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from benchmarks import arguments
from benchmarks.decode import BenchmarkEngine, compare, step_columns
from benchmarks.dummy_model import (
    STRENGTH,
    llama,
    steer_config,
    write_model,
    write_steers,
)
from benchmarks.engines import make_engine, set_environment
from benchmarks.result import Result
from benchmarks.rounds import quantile, spread
from benchmarks.serving.model import write_tokenizer
from benchmarks.serving.processes import serving

SHAPE = llama(1024, 2752, 6, 16, 8192)
LOADS = 20
WINDOW_S = 20.0
SETTLE_S = 2.0
PAUSE_S = 2.0
BESIDE_S = 0.9
KEY = "benchmark"


def main() -> None:
    """Measure both parts, or one."""
    parser = arguments.parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=("load", "room"), default=["load", "room"])
    parser.add_argument("--rank", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60, help="timed steps of a leg")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    set_environment()
    result = Result("loading", args.json, rank=args.rank, requests=args.requests)
    with tempfile.TemporaryDirectory(prefix="bench-loading-") as name:
        folder = Path(name)
        write_tokenizer(SHAPE.vocab_size, write_model(SHAPE, folder / "model"))
        steers = write_steers(SHAPE, folder / "steers", count=2, rank=args.rank)
        if "load" in args.parts:
            line = measure_load(args, folder, steers)
            result.add(line, str(line))
        if "room" in args.parts:
            for line in measure_room(args, folder, steers):
                result.add(line, str(line))
    result.show()


def measure_load(args: argparse.Namespace, folder: Path, steers: dict[str, Path]) -> dict[str, Any]:
    """The step times of running requests before, during and after loads."""
    room = {"lm_steers": 4, "max_rank": args.rank}
    runtime = {"enabled": True, "folders": [str(folder / "steers")], "room": room}
    config = folder / "steers.json"
    config.write_text(json.dumps({"runtime": runtime}))
    os.environ["VLLM_STEER_API_KEY"] = KEY
    options = [
        f"--steer-config={config}",
        "--served-model-name=base",
        "--load-format=dummy",
        "--dtype=float32",
        "--max-model-len=2048",
        f"--max-num-seqs={args.requests}",
    ]
    with serving(folder / "model", options, folder / "serve.log", plugin=True) as url:
        times: list[float] = []
        stop = threading.Event()
        clients = [
            threading.Thread(target=_decode, args=(url, times if row == 0 else [], stop, row))
            for row in range(args.requests)
        ]
        for client in clients:
            client.start()
        time.sleep(5 * SETTLE_S)
        marks = [time.perf_counter()]
        time.sleep(WINDOW_S)
        marks.append(time.perf_counter())
        spans = _load_repeatedly(url, list(steers.values()))
        marks.append(time.perf_counter())
        time.sleep(WINDOW_S)
        marks.append(time.perf_counter())
        stop.set()
        for client in clients:
            client.join()
    steps = list(pairwise(times))

    def between(first: float, last: float) -> list[float]:
        return sorted(1e3 * (b - a) for a, b in steps if a >= first and b <= last)

    before, after = between(*marks[:2]), between(*marks[2:])
    during = sorted(
        1e3 * (b - a) for a, b in steps if any(a < end and b > start for start, end in spans)
    )
    of_each = [
        max((1e3 * (b - a) for a, b in steps if a < end and b > start), default=0.0)
        for start, end in spans
    ]
    seconds = sorted(end - start for start, end in spans)
    rounds = [_beside(steps, start, end) for start, end in spans]
    plain = 1e3 * statistics.median(statistics.median(beside) for beside, _ in rounds)
    ratios = [statistics.median(own) / statistics.median(beside) for beside, own in rounds]
    return {
        "what": "loads",
        "file_mib": round(steers["s0"].stat().st_size / 2**20, 1),
        "loads": len(spans),
        "load_s": round(statistics.median(seconds), 3),
        "load_s_p80": round(quantile(seconds, 0.8), 3),
        "without_ms": round(plain, 2),
        "with_ms": round(statistics.median(during), 2),
        **spread("ratio", ratios, middle="_median"),
        "steps_with_loads": len(during),
        "longest_ms_without": round(max(before[-1], after[-1]), 2),
        "p99_ms_without": round(quantile(sorted([*before, *after]), 0.99), 2),
        "longest_ms_with": round(during[-1], 2),
        "longest_ms_of_each_load": [round(longest, 1) for longest in of_each],
    }


def _beside(
    steps: Sequence[tuple[float, float]], start: float, end: float
) -> tuple[list[float], list[float]]:
    """The steps shortly before and after a load, and those that a part of it falls into."""
    first, last = start - BESIDE_S, end + BESIDE_S
    own = [b - a for a, b in steps if a < end and b > start]
    around = [b - a for a, b in steps if a > first and b < last and not (a < end and b > start)]
    return around, own


def _load_repeatedly(url: str, files: Sequence[Path]) -> list[tuple[float, float]]:
    """Load and unload steers in turn; when each load began and ended."""
    spans, headers = [], {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
        for index in range(LOADS):
            name, path = f"r{index}", str(files[index % len(files)])
            # Another default each time, so that the steer is not there already.
            body = {"steer_name": name, "steer_path": path, "default_strength": index + 1}
            start = time.perf_counter()
            client.post("/v1/load_steer", json=body).raise_for_status()
            spans.append((start, time.perf_counter()))
            client.post("/v1/unload_steer", json={"steer_name": name}).raise_for_status()
            time.sleep(PAUSE_S)
    return spans


def _decode(url: str, times: list[float], stop: threading.Event, row: int) -> None:
    """Stream one long answer after the other until told to stop, and note when tokens came."""
    body = {
        "model": "base",
        "prompt": [1 + (97 * row + i) % (SHAPE.vocab_size - 2) for i in range(8)],
        "temperature": 0,
        "max_tokens": 2000,
        "ignore_eos": True,
        "stream": True,
    }
    with httpx.Client(base_url=url, timeout=60) as client:
        while not stop.is_set():
            with client.stream("POST", "/v1/completions", json=body) as response:
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        times.append(time.perf_counter())
                    if stop.is_set():
                        break


def measure_room(
    args: argparse.Namespace, folder: Path, steers: dict[str, Path]
) -> list[dict[str, Any]]:
    """Step times with reserved room over those without, with no steer and with one on each row."""
    config = steer_config(steers, args.rank)
    room = {"lm_steers": 8, "max_rank": max(1024, args.rank)}
    reserved = {**config, "runtime": {"enabled": True, "room": room}}
    kinds = (config, config, reserved, reserved, config)
    plain, *others = (_engine(folder / "model", each, args.requests) for each in kinds)
    names = ("control 2", "room 3", "room 4", "control 5")
    lines = []
    for steers_of_rows, steer in (("no steer", None), ("one steer a row", f"s0:{STRENGTH}")):
        rows = [steer] * args.requests
        for what, other in zip(names, others, strict=True):
            rounds = compare(
                (plain, rows), (other, rows), args.steps, SHAPE.vocab_size, args.rounds
            )
            columns = step_columns(rounds)
            columns["without_ms"] = columns.pop("unsteered_ms")
            columns["with_ms"] = columns.pop("steered_ms")
            lines.append({"what": f"{what}, {steers_of_rows}", **columns})
    return lines


def _engine(model: Path, config: dict[str, Any], requests: int) -> BenchmarkEngine:
    llm = make_engine(model, config, load_format="dummy", dtype="float32", max_num_seqs=requests)
    return BenchmarkEngine(llm)


if __name__ == "__main__":
    main()
