"""Times of one call, and the two rates that bound them.

Several sets of inputs are called round-robin, more than a cache holds, so that weights come from
memory. A *sample* is the mean of many calls, in microseconds. On a CUDA device it lies between two
events, around launches from Python (``launched``) or around replays of a CUDA graph that holds one
call of each set (``replayed``), which leaves out the host's share. The host's clock is used
elsewhere, and for the host time of a call while the device works (``issued``).
"""

from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

Call = Callable[[], Any]
Samples = list[float]

SAMPLE_US = 2e3
ISSUED = 20
CACHE_FILES = "/sys/devices/system/cpu/cpu0/cache"


def launched(calls: Sequence[Call], repeats: int, device: torch.device) -> Samples:
    """Time calls from Python, round-robin; each result is dropped at once."""
    next_calls = cycle(calls)
    return _samples(lambda: next(next_calls)(), 1, repeats, device)


def issued(calls: Sequence[Call], repeats: int) -> Samples:
    """Time that the host takes to issue a call: few at a time, so that it never waits for the
    device.
    """
    next_calls, samples = cycle(calls), []
    for _ in range(repeats):
        torch.cuda.synchronize()
        samples.append(_on_clock(lambda: next(next_calls)(), ISSUED) / ISSUED)
    torch.cuda.synchronize()
    return samples


def replayed(graph: "torch.cuda.CUDAGraph", calls: int, repeats: int) -> Samples:
    """Time replays of a graph of ``calls`` calls."""
    return _samples(graph.replay, calls, repeats, torch.device("cuda"))


def capture(calls: Sequence[Call]) -> tuple["torch.cuda.CUDAGraph", list[Any]]:
    """Capture a graph of one call of each set; returns it with the results that a replay
    overwrites.
    """
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
    """Bytes read plus written per second by the fastest of several large copies: an upper bound."""
    size = 2**31 if device.type == "cuda" else 2**27
    source = torch.randint(0, 127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2e6 * size / min(launched([lambda: target.copy_(source)], 11, device))


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of a large product of random matrices, the fastest of several."""
    size = 8192 if device.type == "cuda" else 1024
    first, second = torch.randn(2, size, size, device=device).to(dtype)
    return 2e6 * size**3 / min(launched([lambda: first @ second], 11, device))


def cache_bytes(device: torch.device) -> int:
    """The size of the last-level cache; 32 MiB if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    texts = [path.read_text().strip() for path in Path(CACHE_FILES).glob("index*/size")]
    sizes = [int(text[:-1]) * 1024 for text in texts if text.endswith("K")]
    return max(sizes, default=32 * 2**20)


def _samples(run: Call, calls: int, repeats: int, device: torch.device) -> Samples:
    """``run`` makes ``calls`` calls."""
    stopwatch = _between_events if device.type == "cuda" else _on_clock
    stopwatch(run, 1)
    rounds = max(1, round(SAMPLE_US / min(stopwatch(run, 1) for _ in range(3))))
    return [stopwatch(run, rounds) / (rounds * calls) for _ in range(repeats)]


def _on_clock(run: Call, rounds: int) -> float:
    start = perf_counter()
    for _ in range(rounds):
        run()
    return (perf_counter() - start) * 1e6


def _between_events(run: Call, rounds: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(rounds):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3
