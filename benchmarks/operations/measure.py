"""One form on one case: equal first, then timed, then seen to have done the same while timed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

import timing
import torch

Tensors = tuple[torch.Tensor, ...]

LARGEST_ERROR = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}
SETS = 256
NO_TIME = "no time was left for it"


class Skipped(Exception):
    """A form cannot run a case; the message says why."""


@dataclass(frozen=True)
class Work:
    """A form on one set of inputs.

    run      one call; its results, new tensors or inputs changed in place
    check    raises ``AssertionError`` for wrong results; returns their relative error
    restore  puts inputs back that ``run`` changes
    """

    run: Callable[[], Tensors]
    check: Callable[[Tensors], float]
    restore: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Bench:
    """What all cases of a run have in common.

    repeats    samples per time
    reach      bytes that the sets of inputs of a case fill together
    bandwidth  bytes per second of a large copy on this machine
    matmul     floating-point operations per second of a large matrix product on it
    until      when to begin nothing more, in seconds of ``time.monotonic``
    """

    device: torch.device
    dtype: torch.dtype
    repeats: int
    reach: int
    bandwidth: float
    matmul: float
    until: float = math.inf

    @property
    def out_of_time(self) -> bool:
        """Whether to begin nothing more."""
        return monotonic() >= self.until


def form_line(
    bench: Bench,
    works: Callable[[], Sequence[Work]],
    *,
    floor_bytes: int,
    flops: int,
    matrix: bool,
    repeatable: bool = True,
) -> dict[str, Any]:
    """A form's columns of a line: times and what they mean, or the reason why there are none.

    ``matrix``: the operation is one of matrix products. ``repeatable``: the same inputs give the
    same bits.
    """
    line: dict[str, Any] = {"floor_bytes": floor_bytes, "flops": flops}
    if bench.out_of_time:
        return line | {"skipped": NO_TIME}
    try:
        line |= measure(works(), bench, repeatable=repeatable)
    except Skipped as reason:
        return line | {"skipped": str(reason)}
    except Exception as error:  # a form that fails must not cost the results of the others
        return line | {"failed": f"{type(error).__name__}: {error}"}
    return line | against_floor(line["us"], floor_bytes, flops, bench, matrix=matrix)


def measure(works: Sequence[Work], bench: Bench, *, repeatable: bool) -> dict[str, Any]:
    """Times in microseconds: ``us`` by graph replay on CUDA, by the clock elsewhere. On CUDA beside
    it launches from Python, the device waited for (``eager_us``) or not (``host_us``: what a call
    costs the host).
    """
    expected = [_fresh(work) for work in works]
    error = max(work.check(found) for work, found in zip(works, expected, strict=True))

    def confirm(results: Sequence[Tensors]) -> None:
        for work, found, wanted in zip(works, results, expected, strict=True):
            if repeatable:
                same = all(map(torch.equal, found, wanted))
                assert same, "the timed result is not the one that was checked"
            else:
                work.check(found)

    calls = [work.run for work in works]
    eager = timing.launched(calls, bench.repeats, bench.device)
    confirm([_fresh(work) for work in works])
    line = {"error": float(f"{error:.2g}"), "sets": len(works), "samples": bench.repeats}
    if bench.device.type != "cuda":
        return line | {"method": "clock", **_columns("us", eager)}
    host = timing.issued(calls, bench.repeats, bench.device)
    graph, results = timing.capture(calls)
    replayed = timing.replayed(graph, len(works), bench.repeats)
    _replay(graph, works, results)
    confirm(results)
    times = {"us": replayed, "eager_us": eager, "host_us": host}
    line |= {"method": "graph"}
    for name, found in times.items():
        line |= _columns(name, found)
    return line


def against_floor(
    us: float, floor_bytes: int, flops: int, bench: Bench, *, matrix: bool
) -> dict[str, Any]:
    """What a time means: the floor is the longer of moving the bytes and, for a ``matrix``
    operation, of multiplying.
    """
    moving = 1e6 * floor_bytes / bench.bandwidth
    multiplying = 1e6 * flops / bench.matmul if matrix else 0.0
    floor = max(moving, multiplying)
    return {
        "floor_us": round(floor, 3),
        "bound": "memory" if moving >= multiplying else "arithmetic",
        "share_of_floor": round(floor / us, 4),
        "tb_per_s": round(floor_bytes / us * 1e-6, 4),
        "tflops": round(flops / us * 1e-6, 4),
    }


def sets_for(set_bytes: int, reach: int, *, most: int = SETS) -> int:
    """Sets of inputs that together fill ``reach`` bytes: one if it does so alone, else two or
    more, and never more than ``most``.
    """
    if set_bytes >= reach:
        return 1
    return max(1, min(most, max(2, -(-reach // set_bytes))))


def relative_error(
    found: torch.Tensor, wanted: torch.Tensor, before: torch.Tensor, touched: torch.Tensor
) -> float:
    """``|found - wanted| / |wanted|`` over the ``touched [T]`` rows, which must all differ from
    ``before``; the other rows must not differ in a bit. ``wanted`` is float64.
    """
    assert torch.equal(found[~touched], before[~touched]), "a row without a steer was changed"
    changed = (found[touched] != before[touched]).any(1).all()
    assert changed, "a steered row was not changed"
    if not touched.any():
        return 0.0
    distance = (found[touched].double() - wanted[touched]).norm()
    error = float(distance / wanted[touched].norm())
    assert error <= LARGEST_ERROR[found.dtype], f"relative error {error:.2g} in {found.dtype}"
    return error


def _fresh(work: Work) -> Tensors:
    """The results of one call on inputs as they were given."""
    work.restore()
    return tuple(result.clone() for result in work.run())


def _replay(graph: Any, works: Sequence[Work], results: Sequence[Tensors]) -> None:
    """Run the timed graph once more on fresh inputs; poison shows what it does not write."""
    for result in (tensor for tensors in results for tensor in tensors):
        result.fill_(float("nan") if result.is_floating_point() else -1)
    for work in works:
        work.restore()
    graph.replay()


def _columns(name: str, times: timing.Times) -> dict[str, float]:
    found = {"": times.median, "_p20": times.p20, "_p80": times.p80}
    return {f"{name}{suffix}": round(us, 3) for suffix, us in found.items()}
