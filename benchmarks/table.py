"""Result files as tables: ``python -m benchmarks.table RESULT.json ...`` prints Markdown.

A benchmark has a list of columns, each a heading and what a line has under it; the terminal's table
and the Markdown are made from the same list.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

Line = dict[str, Any]
Cell = Callable[[Line], str]
Columns = tuple[tuple[str, Cell], ...]


def number(key: str, places: int = 2) -> Cell:
    """A figure; a dash where there is none."""
    return lambda line: "-" if line.get(key) is None else f"{line[key]:.{places}f}"


def word(key: str) -> Cell:
    """A name or a count; a zero or nothing is a dash."""
    return lambda line: str(line.get(key) or "-")


def spread(key: str, places: int = 3) -> Cell:
    """From the 20th to the 80th percentile."""
    low, high = number(f"{key}_p20", places), number(f"{key}_p80", places)
    return lambda line: "-" if low(line) == "-" else f"{low(line)} to {high(line)}"


def beside(figure: Cell, bracketed: Cell) -> Cell:
    """A figure, and another in brackets."""
    return lambda line: "-" if figure(line) == "-" else f"{figure(line)} ({bracketed(line)})"


def over_stock(key: str, places: int = 0) -> Cell:
    """A figure and its ratio to that of stock vLLM."""
    return beside(number(key, places), number(f"{key}_ratio"))


def percent(key: str) -> Cell:
    """A share in whole percent."""
    return lambda line: "-" if line.get(key) is None else f"{100 * line[key]:.0f} %"


def with_error(key: str) -> Cell:
    """A share and its standard error, if it has one; a dash for what is compared with itself."""

    def cell(line: Line) -> str:
        value, error = line[key], line.get(f"{key}_error")
        if error is None:
            return f"{value:.2f}"
        return "-" if value == error == 0 else f"{value:.2f} ± {error:.2f}"

    return cell


def counted(line: Line) -> str:
    """What counting steps and rows predicts."""
    low, high = sorted(line["predicted"])
    return f"{low:.2f} to {high:.2f}" if high > low else f"{low:.2f}"


def combination(line: Line) -> str:
    """The properties, marked where nothing was chosen on them."""
    return line["combination"] + ("" if line["seen"] else " (unseen)")


def over_ours(line: Line) -> str:
    """A peer's step over ours."""
    if line["skipped"]:
        return "not run"
    return beside(number("over_ours_median"), spread("over_ours", 2))(line)


def exactly(key: str) -> Cell:
    """A number as it is, zero included."""
    return lambda line: str(line[key])


COLUMNS: dict[str, Columns] = {
    "speed_ratio": (
        ("figure", word("name")),
        ("rows", word("rows")),
        ("distinct", word("distinct")),
        ("rank", word("rank")),
        ("A, ms", number("unsteered_ms")),
        ("B, ms", number("steered_ms")),
        ("ratio B/A", number("ratio_median", 3)),
        ("p20 to p80", spread("ratio")),
        ("by bytes", number("predicted_ratio", 3)),
    ),
    "peers": (
        ("what", word("name")),
        ("shape", word("shape")),
        ("rows", word("rows")),
        ("rank", word("rank")),
        ("unsteered, ms", number("unsteered_ms")),
        ("steered, ms", number("steered_ms")),
        ("ratio", number("ratio_median", 3)),
        ("p20 to p80", spread("ratio")),
        ("tokens/s", number("tokens_per_s", 0)),
        ("steered over ours", over_ours),
    ),
    "serving": (
        ("mode", word("mode")),
        ("what", word("what")),
        ("load", word("concurrency")),
        ("distinct", word("distinct")),
        ("rank", word("rank")),
        ("tokens/s", number("tok_per_s", 0)),
        ("ratio", number("tok_per_s_ratio", 3)),
        ("p20 to p80", spread("tok_per_s_ratio")),
        ("TTFT p50, ms", over_stock("ttft_p50_ms")),
        ("TTFT p99, ms", over_stock("ttft_p99_ms")),
        ("TPOT p50, ms", over_stock("tpot_p50_ms", 1)),
        ("TPOT p99, ms", over_stock("tpot_p99_ms", 1)),
        ("batch p50, ms", over_stock("batch_p50_ms")),
    ),
    "kernels": (
        ("operation", word("section")),
        ("case", word("case")),
        ("rows", word("rows")),
        ("width", word("width")),
        ("rank", word("rank")),
        ("steers", word("distinct")),
        ("doses", word("doses")),
        ("form", word("form")),
        ("us", number("us", 1)),
        ("p20 to p80", spread("us", 1)),
        ("floor, us", number("floor_us", 1)),
        ("of the floor", percent("share_of_floor")),
    ),
    "fit_speed": (
        ("model", word("model")),
        ("loop", word("loop")),
        ("texts", word("texts")),
        ("batch", word("batch_size")),
        ("steps", word("steps")),
        ("seconds", number("seconds", 1)),
        ("steps/s", number("steps_per_s", 2)),
        ("over head", number("speedup", 2)),
        ("p20 to p80", spread("speedup", 2)),
        ("memory, MiB", number("memory_mib", 0)),
    ),
    "dynamic_cost": (
        ("model", word("model")),
        ("figure", word("figure")),
        ("what", word("what")),
        ("requests", word("requests")),
        ("A, ms", number("a_ms")),
        ("B, ms", number("b_ms")),
        ("ratio", number("ratio")),
        ("p20 to p80", spread("ratio", 2)),
        ("by counting", counted),
        ("over floor", number("over_floor")),
        ("goal", word("goal")),
    ),
    "composition": (
        ("combination", combination),
        ("method", word("method")),
        ("strengths", word("strengths")),
        ("all", with_error("all")),
        ("beside fixed", with_error("beside")),
        ("perplexity", number("perplexity")),
        ("median", number("median")),
        ("dist-2", number("dist_2")),
    ),
    "kernel_resources": (
        ("operation", word("operation")),
        ("width", word("width")),
        ("rank", word("rank")),
        ("dtype", word("dtype")),
        ("kernel", word("kernel")),
        ("registers", word("registers")),
        ("shared, bytes", word("shared_bytes")),
        ("spilled, bytes", exactly("spilled_bytes")),
        ("tensor cores", lambda line: "yes" if line["tensor_cores"] else "no"),
    ),
}


def headings(result: Line) -> list[str]:
    """The table's first line."""
    return [heading for heading, _ in COLUMNS[result["benchmark"]]]


def cells(result: Line) -> list[list[str]]:
    """A list per line of a result."""
    return [[cell(line) for _, cell in COLUMNS[result["benchmark"]]] for line in result["rows"]]


def rich_table(result: Line) -> Table:
    """A result for the terminal."""
    table = Table(*headings(result), title=title(result))
    for row in cells(result):
        table.add_row(*row)
    return table


def markdown(result: Line) -> str:
    """A result as a Markdown table under its title, with the command that made it."""
    return framed(result, grid(headings(result), cells(result)))


def framed(result: Line, table: Sequence[str]) -> str:
    """The lines of a table between a result's title and its origin."""
    return "\n".join([f"**{title(result)}**", "", *table, "", origin(result)])


def grid(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]


def title(result: Line) -> str:
    """What was measured, where and with what."""
    machine, versions = result["machine"], result["versions"]
    what = [result[key] for key in ("shape", "dtype", "target") if key in result]
    device = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    used = [f"{name} {versions[name]}" for name in ("vllm", "torch", "triton") if versions[name]]
    return ", ".join([*what, device, *used, result["date"][:10]])


def origin(result: Line) -> str:
    """The command and the state of the tree that a result comes from."""
    git, load = result["git"], result["machine"]["load_average"][0]
    dirty = " and local changes" if git["dirty"] else ""
    threads = f" {result['threads']} threads," if "threads" in result else ""
    return (
        f"`{result['command']}`, commit {(git['commit'] or 'unknown')[:12]}{dirty},{threads} "
        f"load average at the start {load}."
    )


def main(paths: Sequence[str]) -> None:
    """Print every result file given."""
    if not paths:
        sys.exit("usage: python -m benchmarks.table RESULT.json ...")
    print("\n\n".join(markdown(json.loads(Path(path).read_text("utf-8"))) for path in paths))


if __name__ == "__main__":
    main(sys.argv[1:])
