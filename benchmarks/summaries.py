"""Results in short: figures over batch sizes, operations over forms, kernels at their most."""

from collections.abc import Callable
from typing import Any

from benchmarks.table import beside, framed, grid, number, percent, spread

Line = dict[str, Any]
Table = tuple[list[str], list[list[str]]]
SHARED = 4  # more distinct steers than that are one per row in the runs made so far


def summary(result: Line) -> str:
    """As ``table.markdown``, with fewer lines."""
    return framed(result, grid(*MAKERS[result["benchmark"]](result["rows"])))


def over_batch_sizes(rows: list[Line]) -> Table:
    """A line per figure and number of steers, a column per batch size."""
    ratio = beside(number("ratio_median", 3), spread("ratio"))
    sizes = sorted({line["rows"] for line in rows})
    pivot: dict[tuple[str, str], dict[int, str]] = {}
    for line in rows:
        for steers in _steers(line):
            pivot.setdefault((line["name"], steers), {})[line["rows"]] = ratio(line)
    heads = ["figure", "steers", *(f"{size} row{'s' * (size > 1)}" for size in sizes)]
    return heads, [
        [*name, *(found.get(size, "-") for size in sizes)] for name, found in pivot.items()
    ]


def _steers(line: Line) -> list[str]:
    """What the rows of a line of ``speed_ratio`` share."""
    if not line["distinct"]:
        return ["none"]
    if line["name"] != "steered":
        return ["a strength per row"]
    one_each = ["one per row"] if line["distinct"] == line["rows"] else []
    few = [str(line["distinct"])] if line["distinct"] <= SHARED else []
    return [*few, *one_each]


def over_forms(rows: list[Line]) -> Table:
    """A line per case of LM-Steer, a column per form: microseconds, share of the floor."""
    time = beside(number("us", 1), percent("share_of_floor"))
    grid = [line for line in rows if (line["section"], line["case"]) == ("lm_steer", "grid")]
    timed = [line for line in grid if "us" in line]
    forms = list(dict.fromkeys(line["form"] for line in timed))
    pivot: dict[tuple[int, ...], dict[str, str]] = {}
    for line in timed:
        case = tuple(line[key] for key in ("width", "rank", "rows", "distinct"))
        pivot.setdefault(case, {"floor": number("floor_us", 1)(line)})[line["form"]] = time(line)
    return ["d", "r", "rows", "steers", "floor", *forms], [
        [*map(str, case), *(found.get(name, "-") for name in ("floor", *forms))]
        for case, found in pivot.items()
    ]


def at_most(rows: list[Line]) -> Table:
    """A line per kernel: the most that any variant needs."""
    keys = ("registers", "shared_bytes", "spilled_bytes")
    kernels: dict[tuple[str, str], list[Line]] = {}
    for line in rows:
        kernels.setdefault((line["operation"].partition(",")[0], line["kernel"]), []).append(line)
    heads = ["operation", "kernel", "variants", "registers", "shared, bytes", "spilled, bytes"]
    return heads, [
        [*name, str(len(found)), *(str(max(line[key] for line in found)) for key in keys)]
        for name, found in sorted(kernels.items())
    ]


MAKERS: dict[str, Callable[[list[Line]], Table]] = {
    "speed_ratio": over_batch_sizes,
    "kernels": over_forms,
    "kernel_resources": at_most,
}
