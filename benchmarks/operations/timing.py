"""The time of one call, and the two rates that no call can beat.

Several sets of inputs are called in turn, more than a cache holds, so that weights come from
memory. A *sample* is the mean of many calls; reported are median, 20th and 80th percentile of the
samples. On a CUDA device a sample lies between two events, around launches from Python
(``launched``) or around replays of a CUDA graph that holds one call of each set (``replayed``),
which leaves out the host's share. Elsewhere the host's clock is read, and for what a call costs the
host while the device works (``issued``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from benchmarks.rounds import quantile

Call = Callable[[], Any]

SAMPLE_S = 2e-3
ISSUED = 20
CACHE_FILES = "/sys/devices/system/cpu/cpu0/cache"


@dataclass(frozen=True)
class Times:
    """Microseconds per call."""

    median: float
    p20: float
    p80: float
    fastest: float


def sync(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def launched(calls: Sequence[Call], repeats: int, device: torch.device) -> Times:
    """Calls from Python in turn, each result dropped at once."""
    turns = cycle(calls)
    return _times(lambda: next(turns)(), 1, repeats, device)


def issued(calls: Sequence[Call], repeats: int, device: torch.device) -> Times:
    """What issuing a call costs the host: few at a time, so that it never waits for the device."""
    turns, samples = cycle(calls), []
    for _ in range(repeats):
        sync(device)
        samples.append(on_clock(lambda: next(turns)(), ISSUED) / ISSUED)
    sync(device)
    return summarise(samples)


def replayed(graph: "torch.cuda.CUDAGraph", calls: int, repeats: int) -> Times:
    """Replays of a graph of ``calls`` calls."""
    return _times(graph.replay, calls, repeats, torch.device("cuda"))


def capture(calls: Sequence[Call]) -> tuple["torch.cuda.CUDAGraph", list[Any]]:
    """A graph of every call once, and the results that a replay writes anew."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]
    return graph, results


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read plus written per second by a large copy, the fastest of several: a ceiling."""
    size = 2**31 if device.type == "cuda" else 2**27
    source = torch.randint(0, 127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    times = launched([lambda: target.copy_(source)], 11, device)
    return 2 * size / times.fastest * 1e6


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of a large product of random matrices, the fastest of several."""
    size = 8192 if device.type == "cuda" else 1024
    first, second = torch.randn(2, size, size, device=device).to(dtype)
    times = launched([lambda: first @ second], 11, device)
    return 2 * size**3 / times.fastest * 1e6


def cache_bytes(device: torch.device) -> int:
    """The last cache before the memory; 32 MiB where the machine does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    texts = [path.read_text().strip() for path in Path(CACHE_FILES).glob("index*/size")]
    sizes = [int(text[:-1]) * 1024 for text in texts if text.endswith("K")]
    return max(sizes, default=32 * 2**20)


def summarise(samples: Sequence[float]) -> Times:
    """Seconds per call, in any order, as ``Times``."""
    ordered = sorted(samples)
    return Times(*(1e6 * quantile(ordered, share) for share in (0.5, 0.2, 0.8, 0)))


def _times(run: Call, calls: int, repeats: int, device: torch.device) -> Times:
    """``run`` makes ``calls`` calls."""
    stopwatch = _between_events if device.type == "cuda" else on_clock
    stopwatch(run, 1)
    rounds = max(1, round(SAMPLE_S / min(stopwatch(run, 1) for _ in range(3))))
    return summarise([stopwatch(run, rounds) / (rounds * calls) for _ in range(repeats)])


def on_clock(run: Call, rounds: int) -> float:
    """Seconds that ``rounds`` runs take the host."""
    start = perf_counter()
    for _ in range(rounds):
        run()
    return perf_counter() - start


def _between_events(run: Call, rounds: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(rounds):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3
