"""Result files as Markdown tables: ``python -m benchmarks.table RESULT.json ...`` prints them.

A benchmark has a list of columns, each a heading and a function of a line. Figures over batch sizes
and forms of LM-Steer have a short form for the documents.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]
Cell = Callable[[Line], str]
Columns = tuple[tuple[str, Cell], ...]
Cells = tuple[list[str], list[list[str]]]  # the headings, and the rows
SHARED = 4  # above this number, steers are one per row in all runs so far


def number(key: str, places: int = 2) -> Cell:
    """A figure; a dash if missing."""
    return lambda line: "-" if line.get(key) is None else f"{line[key]:.{places}f}"


def word(key: str) -> Cell:
    """A name or a count; a dash for zero or a missing value."""
    return lambda line: str(line.get(key) or "-")


def spread(key: str, places: int = 3) -> Cell:
    """The range from the 20th to the 80th percentile."""
    low, high = number(f"{key}_p20", places), number(f"{key}_p80", places)
    return lambda line: "-" if low(line) == "-" else f"{low(line)} to {high(line)}"


def beside(figure: Cell, bracketed: Cell) -> Cell:
    """A figure, with another in brackets."""
    return lambda line: "-" if figure(line) == "-" else f"{figure(line)} ({bracketed(line)})"


def over_stock(key: str, places: int = 0) -> Cell:
    """A figure and its ratio to that of stock vLLM."""
    return beside(number(key, places), number(f"{key}_ratio"))


def percent(key: str) -> Cell:
    """A share in whole percent."""
    return lambda line: "-" if line.get(key) is None else f"{100 * line[key]:.0f} %"


def with_error(key: str) -> Cell:
    """A share and its standard error, if there is one; a dash for a comparison with itself."""

    def cell(line: Line) -> str:
        value, error = line[key], line.get(f"{key}_error")
        if error is None:
            return f"{value:.2f}"
        return "-" if value == error == 0 else f"{value:.2f} ± {error:.2f}"

    return cell


def combination(line: Line) -> str:
    """The properties, with a mark for an unseen combination."""
    return str(line["combination"]) + ("" if line["seen"] else " (unseen)")


def over_ours(line: Line) -> str:
    """A peer's step over that of vllm-steer."""
    if line.get("skipped"):
        return "not run"
    return beside(number("over_ours_median"), spread("over_ours", 2))(line)


SHOWN_MODES = (None, "serve", "add", "rotate")
"""Of ``vllm bench``: older results also have lines of ``throughput`` and ``latency``."""

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
    "selftest_cost": (
        ("layers", word("layers")),
        ("parameters, M", lambda line: f"{line['parameters'] / 1e6:.0f}"),
        ("self-test, s", number("model_sites_s", 3)),
        ("check of steers, s", number("check_steering_s", 3)),
        ("memory, MiB", number("model_sites_mib", 1)),
        ("whole start, s", number("start_s", 1)),
    ),
    "loading": (
        ("", word("what")),
        ("step without, ms", number("without_ms")),
        ("with, ms", number("with_ms")),
        ("ratio", number("ratio_median", 3)),
        ("p20 to p80", spread("ratio")),
        ("longest step without, ms", number("longest_ms_without", 0)),
        ("with, ms", number("longest_ms_with", 0)),
        ("seconds of a load", number("load_s", 3)),
    ),
    "layers": (
        ("engine", word("engine")),
        ("steer of each row", word("steer")),
        ("rows", word("rows")),
        ("step without, ms", number("unsteered_ms")),
        ("with, ms", number("steered_ms")),
        ("ratio", number("ratio_median", 3)),
        ("p20 to p80", spread("ratio")),
        ("KiB", number("kib", 0)),
        ("Mflop", number("mflops", 2)),
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
    "dynamic_cost": (
        ("model", word("model")),
        ("figure", word("figure")),
        ("what", word("what")),
        ("requests", word("requests")),
        ("A, ms", number("a_ms")),
        ("B, ms", number("b_ms")),
        ("ratio", number("ratio")),
        ("p20 to p80", spread("ratio", 2)),
        ("over floor", number("over_floor")),
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
}


def markdown(result: Line) -> str:
    """A result as a Markdown table under its title, with the command that made it."""
    columns = COLUMNS[result["benchmark"]]
    heads = [heading for heading, _ in columns]
    lines = [line for line in result["rows"] if line.get("mode") in SHOWN_MODES]
    return framed(result, grid(heads, [[cell(line) for _, cell in columns] for line in lines]))


def summary(result: Line) -> str:
    """As ``markdown``, with fewer lines."""
    rows = [*result.get("tried", ()), *result["rows"]]
    return framed(result, grid(*SUMMARIES[result["benchmark"]](rows)))


def framed(result: Line, table: Sequence[str]) -> str:
    """The lines of a table between a result's title and its origin."""
    return "\n".join([f"**{title(result)}**", "", *table, "", origin(result)])


def grid(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]


def title(result: Line) -> str:
    """The title: figure, machine and software."""
    machine, versions = result["machine"], result["versions"]
    parts = [result[key] for key in ("shape", "dtype") if key in result]
    device = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    used = [f"{name} {versions[name]}" for name in ("vllm", "torch", "triton") if versions[name]]
    return ", ".join([*parts, device, *used, result["date"][:10]])


def origin(result: Line) -> str:
    """The command and the state of the tree that a result comes from."""
    git, load = result["git"], result["machine"]["load_average"][0]
    dirty = " and local changes" if git["dirty"] else ""
    threads = f" {result['threads']} threads," if "threads" in result else ""
    return (
        f"`{result['command']}`, commit {(git['commit'] or 'unknown')[:12]}{dirty},{threads} "
        f"load average at the start {load}."
    )


def over_batch_sizes(rows: list[Line]) -> Cells:
    """A line per figure and number of steers, a column per batch size."""
    ratio = beside(number("ratio_median", 3), spread("ratio"))
    sizes = sorted({line["rows"] for line in rows})
    pivot: dict[tuple[str, str], dict[int, str]] = {}
    for line in rows:
        for steers in _steers(line):
            pivot.setdefault((line["name"], steers), {})[line["rows"]] = ratio(line)
    heads = ["figure", "steers", *(f"{size} row{'s' * (size > 1)}" for size in sizes)]
    return heads, [
        [*name, *(cells.get(size, "-") for size in sizes)] for name, cells in pivot.items()
    ]


def _steers(line: Line) -> list[str]:
    """The steers that the rows of a line of ``speed_ratio`` share."""
    if not line["distinct"]:
        return ["none"]
    if line["name"] != "steered":
        return ["a strength per row"]
    one_each = ["one per row"] if line["distinct"] == line["rows"] else []
    counts = [str(line["distinct"])] if line["distinct"] <= SHARED else []
    return [*counts, *one_each]


def over_forms(rows: list[Line]) -> Cells:
    """A line per case of LM-Steer, a column per form: microseconds, share of the floor."""
    time = beside(number("us", 1), percent("share_of_floor"))
    cases = [line for line in rows if (line["section"], line["case"]) == ("lm_steer", "grid")]
    timed = [line for line in cases if "us" in line]
    forms = list(dict.fromkeys(line["form"] for line in timed))
    pivot: dict[tuple[int, ...], dict[str, str]] = {}
    for line in timed:
        case = tuple(line[key] for key in ("width", "rank", "rows", "distinct"))
        pivot.setdefault(case, {"floor": number("floor_us", 1)(line)})[line["form"]] = time(line)
    return ["d", "r", "rows", "steers", "floor", *forms], [
        [*map(str, case), *(cells.get(name, "-") for name in ("floor", *forms))]
        for case, cells in pivot.items()
    ]


def of_the_pair(rows: list[Line]) -> Cells:
    """The choices for language and sentiment, with the selected one: share and perplexity."""
    share, perplexity = with_error("all"), number("perplexity")
    return ["prompts", "method", "strengths", "all", "perplexity"], [
        [
            "reported" if "combination" in line else "choosing",
            line["method"],
            line["strengths"] or "-",
            share(line),
            perplexity(line),
        ]
        for line in rows
        if line.get("combination", "fr+cheer") == "fr+cheer"
    ]


SUMMARIES: dict[str, Callable[[list[Line]], Cells]] = {
    "speed_ratio": over_batch_sizes,
    "kernels": over_forms,
    "composition": of_the_pair,
}


def main(paths: Sequence[str]) -> None:
    """Print every result file given."""
    print("\n\n".join(markdown(json.loads(Path(path).read_text("utf-8"))) for path in paths))


if __name__ == "__main__":
    main(sys.argv[1:])
