"""Measures one form on one case: checked, then timed, then checked again on the timed calls."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from benchmarks.operations import timing
from benchmarks.rounds import spread

Tensors = tuple[torch.Tensor, ...]
Line = dict[str, Any]

LARGEST_ERROR = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}
SETS = 256


class Skipped(Exception):
    """A form cannot run a case; the message says why."""


@dataclass(frozen=True)
class Operation:
    """A form on one set of inputs.

    run      one call; returns its results, new tensors or inputs changed in place
    check    raises ``AssertionError`` for wrong results; returns their relative error
    restore  restores inputs that ``run`` changes
    """

    run: Callable[[], Tensors]
    check: Callable[[Tensors], float]
    restore: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class MeasurementSetup:
    """Settings of all cases of a run.

    repeats    samples per time
    reach      total bytes of the sets of inputs of a case
    bandwidth  bytes per second of a large copy on this machine
    matmul     floating-point operations per second of a large matrix product on it
    """

    device: torch.device
    dtype: torch.dtype
    repeats: int = 1
    reach: int = 0
    bandwidth: float = math.inf
    matmul: float = math.inf


class OperationCase:
    """A case of an operation, a dataclass of its sizes.

    It has ``floor_bytes(itemsize)``, the fewest bytes of one call; ``sets(bench)``, sets of inputs,
    together beyond the cache; and ``work(form, inputs)``, a form on one of them. ``flops`` are the
    operations of its matrix products, 0 without any.
    """

    section: ClassVar[str]
    case: str
    flops: int | property = 0
    floor_bytes: Callable[[int], int]
    sets: Callable[[MeasurementSetup], list[Any]]
    work: Callable[[str, Any], Operation]

    @property
    def columns(self) -> Line:
        """The columns that identify it in a line of the result."""
        return {"section": self.section, "case": self.case, **vars(self)}


def lines(case: OperationCase, forms: Sequence[str], bench: MeasurementSetup) -> Iterator[Line]:
    """A line per form: times and derived figures, or the reason why there are none."""
    sets, dtype = case.sets(bench), str(bench.dtype).removeprefix("torch.")
    for form in forms:
        head = {**case.columns, "dtype": dtype, "form": form}
        yield head | _form_line(case, form, sets, bench)


def _form_line(
    case: OperationCase, form: str, sets: Sequence[Any], bench: MeasurementSetup
) -> Line:
    try:
        times = measure([case.work(form, inputs) for inputs in sets], bench)
    except Skipped as reason:
        return {"skipped": str(reason)}
    except Exception as error:  # a failed form must not lose the results of the others
        return {"failed": f"{type(error).__name__}: {error}"}
    floor = case.floor_bytes(bench.dtype.itemsize)
    return times | against_floor(times["us"], floor, case.flops, bench)


def measure(works: Sequence[Operation], bench: MeasurementSetup) -> Line:
    """Times in microseconds: ``us`` by graph replay on CUDA, by the clock elsewhere; on CUDA also
    ``host_us``, the host time of a call.
    """
    expected = [_fresh(work) for work in works]
    error = max(
        work.check(results_of_set) for work, results_of_set in zip(works, expected, strict=True)
    )

    def confirm(results: Sequence[Tensors]) -> None:
        for results_of_set, expected_results in zip(results, expected, strict=True):
            same = all(map(torch.equal, results_of_set, expected_results))
            assert same, "the timed result is not the one that was checked"

    line: Line = {"error": float(f"{error:.2g}")}
    calls = [work.run for work in works]
    if bench.device.type != "cuda":
        line |= spread("us", timing.launched(calls, bench.repeats, bench.device))
        confirm([_fresh(work) for work in works])
        return line
    line |= spread("host_us", timing.issued(calls, bench.repeats))
    graph, results = timing.capture(calls)
    line |= spread("us", timing.replayed(graph, len(works), bench.repeats))
    _replay(graph, works, results)
    confirm(results)
    return line


def against_floor(us: float, floor_bytes: int, flops: int, bench: MeasurementSetup) -> Line:
    """Compare a time with its floor: the longer of memory time and arithmetic time."""
    moving, multiplying = 1e6 * floor_bytes / bench.bandwidth, 1e6 * flops / bench.matmul
    floor = max(moving, multiplying)
    return {
        "floor_us": round(floor, 3),
        "bound": "memory" if moving >= multiplying else "arithmetic",
        "share_of_floor": round(floor / us, 4),
    }


def dispatched(find: Callable[..., Any], kernels: str, device: torch.device, **options: Any) -> Any:
    """A form from the dispatch: ``torch``, ``triton`` or ``auto``, as in an engine."""
    if kernels == "triton" and device.type != "cuda":
        raise Skipped(f"the device is {device.type}: an interpreter's time is no kernel's time")
    return find(kernels, device, **options)


def sets_for(set_bytes: int, reach: int) -> int:
    """The number of sets of inputs that fill ``reach`` bytes: one if a single set does, else at
    least two, and at most ``SETS``.
    """
    return 1 if set_bytes >= reach else min(SETS, max(2, -(-reach // set_bytes)))


def relative_error(
    result: torch.Tensor, expected: torch.Tensor, before: torch.Tensor, touched: torch.Tensor
) -> float:
    """``|result - expected| / |expected|`` over the ``touched [T]`` rows, which must all differ
    from ``before``; the other rows must not differ in a bit. ``expected`` is float64.
    """
    assert torch.equal(result[~touched], before[~touched]), "a row without a steer was changed"
    changed = (result[touched] != before[touched]).any(1).all()
    assert changed, "a steered row was not changed"
    distance = (result[touched].double() - expected[touched]).norm()
    error = float(distance / expected[touched].norm())
    assert error <= LARGEST_ERROR[result.dtype], f"relative error {error:.2g} in {result.dtype}"
    return error


def _fresh(work: Operation) -> Tensors:
    """The results of one call on restored inputs."""
    work.restore()
    return tuple(result.clone() for result in work.run())


def _replay(graph: Any, works: Sequence[Operation], results: Sequence[Tensors]) -> None:
    """Run the timed graph again on fresh inputs; results are poisoned first, to detect missing
    writes.
    """
    for result in (tensor for tensors in results for tensor in tensors):
        result.fill_(float("nan") if result.is_floating_point() else -1)
    for work in works:
        work.restore()
    graph.replay()
