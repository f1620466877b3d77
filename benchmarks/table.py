"""Result files as tables: ``python benchmarks/table.py RESULT.json ...`` prints markdown."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

Cell = Callable[[dict[str, Any]], str]


def number(key: str, places: int = 2, missing: str = "-") -> Cell:
    """A figure; ``missing`` where there is none."""
    return lambda line: missing if line.get(key) is None else f"{line[key]:.{places}f}"


def word(key: str) -> Cell:
    """A name or a count; a zero or nothing is a dash."""
    return lambda line: str(line.get(key) or "-")


def spread(low: str, high: str, places: int = 3) -> Cell:
    """From the 20th to the 80th percentile."""
    lower, upper = number(low, places), number(high, places)
    return lambda line: "-" if line.get(low) is None else f"{lower(line)} to {upper(line)}"


COLUMNS: dict[str, tuple[tuple[str, Cell], ...]] = {
    "speed_ratio": (
        ("figure", word("name")),
        ("rows", word("rows")),
        ("distinct", word("distinct")),
        ("rank", word("rank")),
        ("A, ms", number("unsteered_ms")),
        ("B, ms", number("steered_ms")),
        ("ratio B/A", number("ratio_median", 3)),
        ("p20 to p80", spread("ratio_p20", "ratio_p80")),
        ("by bytes", number("predicted_ratio", 3)),
    ),
    "kernel_resources": (
        ("operation", word("operation")),
        ("width", word("width")),
        ("rank", word("rank")),
        ("dtype", word("dtype")),
        ("kernel", word("kernel")),
        ("registers", word("registers")),
        ("shared, bytes", word("shared_bytes")),
        ("spilled, bytes", lambda line: str(line["spilled_bytes"])),
        ("tensor cores", lambda line: "yes" if line["tensor_cores"] else "no"),
    ),
}


def headings(result: dict[str, Any]) -> list[str]:
    """The table's first line."""
    return [heading for heading, _ in COLUMNS[result["benchmark"]]]


def cells(result: dict[str, Any], line: dict[str, Any]) -> list[str]:
    """One line of a result."""
    return [cell(line) for _, cell in COLUMNS[result["benchmark"]]]


def title(result: dict[str, Any]) -> str:
    """What was measured, where and with what."""
    machine, versions = result["machine"], result["versions"]
    what = [result[key] for key in ("shape", "dtype", "target") if key in result]
    device = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    used = [f"{name} {versions[name]}" for name in ("vllm", "torch", "triton") if versions[name]]
    return ", ".join([*what, device, *used, result["date"][:10]])


def rich_table(result: dict[str, Any]) -> Table:
    """A result for the terminal."""
    table = Table(*headings(result), title=title(result))
    for line in result["rows"]:
        table.add_row(*cells(result, line))
    return table


def markdown(result: dict[str, Any]) -> str:
    """A result as a markdown table under its title, with the command that made it."""
    lines = [cells(result, line) for line in result["rows"]]
    return "\n".join(
        [f"**{title(result)}**", "", *_grid(headings(result), lines), "", origin(result)]
    )


def summary(result: dict[str, Any]) -> str:
    """A result of ``speed_ratio`` in short: a line per figure, a column per batch size."""
    ratios: dict[tuple[str, int], dict[int, str]] = {}
    for line in result["rows"]:
        distinct = 0 if line["distinct"] in (0, line["rows"]) else line["distinct"]
        text = f"{line['ratio_median']:.3f} ({line['ratio_p20']:.3f} to {line['ratio_p80']:.3f})"
        ratios.setdefault((line["name"], distinct), {})[line["rows"]] = text
        if line["distinct"] == line["rows"] == 1:
            ratios.setdefault((line["name"], 1), {})[1] = text
    sizes = sorted({line["rows"] for line in result["rows"]})
    heads = ["figure", "steers", *(f"{size} row{'s' * (size > 1)}" for size in sizes)]
    lines = [
        [name, {0: "one per row" if name in STEERING else "none"}.get(distinct, f"{distinct}")]
        + [by_size.get(size, "-") for size in sizes]
        for (name, distinct), by_size in ratios.items()
    ]
    return "\n".join([f"**{title(result)}**", "", *_grid(heads, lines), "", origin(result)])


STEERING = ("steered", "guided", "rotated")


def origin(result: dict[str, Any]) -> str:
    """The command and the state of the tree that a result comes from."""
    git, load = result["git"], result["machine"]["load_average"][0]
    dirty = " and local changes" if git["dirty"] else ""
    threads = f" {result['threads']} threads," if "threads" in result else ""
    return (
        f"`{result['command']}`, commit {(git['commit'] or 'unknown')[:12]}{dirty},{threads} "
        f"load average at the start {load}."
    )


def _grid(heads: list[str], lines: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *lines)]


def main(paths: list[str]) -> None:
    """Print every result file given."""
    if not paths:
        sys.exit("usage: python benchmarks/table.py RESULT.json ...")
    print("\n\n".join(markdown(json.loads(Path(path).read_text())) for path in paths))


if __name__ == "__main__":
    main(sys.argv[1:])
