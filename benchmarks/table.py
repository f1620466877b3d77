"""Result files as tables: ``python benchmarks/table.py RESULT.json ...`` prints markdown."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers import columns as peers
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


def ratio(key: str, places: int = 0) -> Cell:
    """A figure, and in brackets its ratio to that of stock vLLM."""
    figure, over_stock = number(key, places), number(f"{key}_ratio", 2)
    return lambda line: "-" if key not in line else f"{figure(line)} ({over_stock(line)})"


def percent(key: str) -> Cell:
    """A share in whole percent."""
    return lambda line: "-" if line.get(key) is None else f"{100 * line[key]:.0f} %"


def operation(line: dict[str, Any]) -> str:
    """What a line of ``kernels`` does, in words."""
    words = [line["section"], line["case"], line.get("mode")]
    for key, text in OPERATION.items():
        if line.get(key) not in (None, 0):
            words.append(text.format(line[key]))
    if line.get("share", 1) < 1:
        words.append(f"{100 * line['share']:g} % steered")
    return ", ".join(word for word in words if word)


OPERATION = {"rank": "rank {}", "distinct": "{} steers", "doses": "{} doses", "layers": "{} layers"}


def load(line: dict[str, Any]) -> str:
    """Requests per second, or requests in flight."""
    return f"{line['rate']:g}/s" if line.get("rate") else str(line["concurrency"])


def counted(line: dict[str, Any]) -> str:
    """What counting steps and rows predicts."""
    low, high = sorted(line["predicted"])
    return f"{low:.2f} to {high:.2f}" if high > low else f"{low:.2f}"


def unseen(line: dict[str, Any]) -> str:
    """The combination, marked where nothing was chosen on it."""
    return line["combination"] + ("" if line["seen"] else " (unseen)")


def with_error(key: str) -> Cell:
    """A share and its standard error; a dash for what is compared with itself."""

    def cell(line: dict[str, Any]) -> str:
        value, error = line[key], line[f"{key}_error"]
        return "-" if value == error == 0 else f"{value:.2f} ± {error:.2f}"

    return cell


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
    "serving": (
        ("mode", word("mode")),
        ("what", word("what")),
        ("load", load),
        ("distinct", word("distinct")),
        ("rank", word("rank")),
        ("tokens/s", number("tok_per_s", 0)),
        ("ratio", number("tok_per_s_ratio", 3)),
        ("p20 to p80", spread("tok_per_s_ratio_p20", "tok_per_s_ratio_p80")),
        ("TTFT p50, ms", ratio("ttft_p50_ms")),
        ("TTFT p99, ms", ratio("ttft_p99_ms")),
        ("TPOT p50, ms", ratio("tpot_p50_ms", 1)),
        ("TPOT p99, ms", ratio("tpot_p99_ms", 1)),
        ("batch p50, ms", ratio("batch_p50_ms")),
    ),
    "kernels": (
        ("operation", lambda line: operation(line)),
        ("rows", word("rows")),
        ("width", word("width")),
        ("form", word("form")),
        ("us", number("us", 1)),
        ("p20 to p80", spread("us_p20", "us_p80", 1)),
        ("floor, us", number("floor_us", 1)),
        ("of the floor", percent("share_of_floor")),
        ("TB/s", number("tb_per_s", 3)),
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
        ("p20 to p80", spread("speedup_p20", "speedup_p80", 2)),
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
        ("p20 to p80", spread("ratio_p20", "ratio_p80", 2)),
        ("by counting", counted),
        ("over floor", number("over_floor")),
        ("goal", word("goal")),
    ),
    "composition": (
        ("combination", unseen),
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
        ("spilled, bytes", lambda line: str(line["spilled_bytes"])),
        ("tensor cores", lambda line: "yes" if line["tensor_cores"] else "no"),
    ),
}


def headings(result: dict[str, Any]) -> list[str]:
    """The table's first line."""
    if result["benchmark"] == "peers":
        return list(peers.HEADINGS)
    return [heading for heading, _ in COLUMNS[result["benchmark"]]]


def cells(result: dict[str, Any], line: dict[str, Any]) -> list[str]:
    """One line of a result."""
    if result["benchmark"] == "peers":
        return peers.cells(line)
    return [cell(line) for _, cell in COLUMNS[result["benchmark"]]]


def measured(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines with figures, and of peers those without as well."""
    if result["benchmark"] == "peers":
        return result["rows"]
    return [line for line in result["rows"] if not {"skipped", "failed"} & set(line)]


def reasons(result: dict[str, Any]) -> list[str]:
    """Why forms and peers have no figures, each reason once."""
    if result["benchmark"] == "peers":
        return peers.reasons(result)
    gone = [line for line in result["rows"] if {"skipped", "failed"} & set(line)]
    said = [f"{line['form']}: {line.get('skipped') or line['failed']}." for line in gone]
    return list(dict.fromkeys(said))


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
    for line in measured(result):
        table.add_row(*cells(result, line))
    return table


def markdown(result: dict[str, Any]) -> str:
    """A result as a markdown table under its title, with the command that made it."""
    lines = [cells(result, line) for line in result["rows"]]
    return "\n".join(
        [f"**{title(result)}**", "", *grid(headings(result), lines), "", origin(result)]
    )


def summary(result: dict[str, Any]) -> str:
    """A result in short: figures over batch sizes, operations over forms, kernels at their most."""
    makers = {
        "speed_ratio": _over_batch_sizes,
        "kernels": _over_forms,
        "kernel_resources": _at_most,
        "composition": _of_the_pair,
    }
    rows = result["rows"]
    if result["benchmark"] == "composition":
        rows = [*result["tried"], *rows]
    heads, lines = makers[result["benchmark"]](rows)
    return "\n".join([f"**{title(result)}**", "", *grid(heads, lines), "", origin(result)])


def _over_batch_sizes(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A line per figure and number of steers, a column per batch size."""
    sizes = sorted({line["rows"] for line in rows})
    pivot: dict[tuple[str, str], dict[int, str]] = {}
    for line in rows:
        text = f"{line['ratio_median']:.3f} ({line['ratio_p20']:.3f} to {line['ratio_p80']:.3f})"
        for steers in _steers(line):
            pivot.setdefault((line["name"], steers), {})[line["rows"]] = text
    heads = ["figure", "steers", *(f"{size} row{'s' * (size > 1)}" for size in sizes)]
    return heads, [
        [name, steers, *(found.get(size, "-") for size in sizes)]
        for (name, steers), found in pivot.items()
    ]


def _steers(line: dict[str, Any]) -> list[str]:
    """What the rows of a line of ``speed_ratio`` share."""
    if not line["distinct"]:
        return ["none"]
    if line["name"] != "steered":
        return ["a strength per row"]
    one_each = ["one per row"] if line["distinct"] == line["rows"] else []
    few = [str(line["distinct"])] if line["distinct"] <= SHARED else []
    return [*few, *one_each]


SHARED = 4  # more distinct steers than that are one per row in the runs made so far


def _over_forms(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A line per case of the grid of LM-Steer, a column per form: microseconds, share of the
    floor.
    """
    grid = [line for line in rows if (line["section"], line["case"]) == ("lm_steer", "grid")]
    timed = [line for line in grid if "us" in line]
    forms = list(dict.fromkeys(line["form"] for line in timed))
    pivot: dict[tuple[int, ...], dict[str, str]] = {}
    for line in timed:
        case = tuple(line[key] for key in ("width", "rank", "rows", "distinct"))
        text = f"{line['us']:.1f} ({100 * line['share_of_floor']:.0f} %)"
        pivot.setdefault(case, {"floor": f"{line['floor_us']:.1f}"})[line["form"]] = text
    heads = ["d", "r", "rows", "steers", "floor", *forms]
    return heads, [
        [*map(str, case), *(found.get(name, "-") for name in ("floor", *forms))]
        for case, found in pivot.items()
    ]


def _at_most(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A line per kernel: the most that any variant needs."""
    keys = ("registers", "shared_bytes", "spilled_bytes")
    kernels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in rows:
        kernels.setdefault((line["operation"].partition(",")[0], line["kernel"]), []).append(line)
    heads = ["operation", "kernel", "variants", "registers", "shared, bytes", "spilled, bytes"]
    return heads, [
        [*name, str(len(found)), *(str(max(line[key] for line in found)) for key in keys)]
        for name, found in sorted(kernels.items())
    ]


def _of_the_pair(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """What was tried for language and sentiment, and what was chosen: share, and its price."""
    heads = ["prompts", "method", "strengths", "all", "perplexity"]
    of_pair = [line for line in rows if line.get("combination", "fr+cheer") == "fr+cheer"]
    return heads, [
        [
            "reported" if "combination" in line else "choosing",
            line["method"],
            line["strengths"] or "-",
            (with_error("all") if "all_error" in line else number("all"))(line),
            number("perplexity")(line),
        ]
        for line in of_pair
    ]


def origin(result: dict[str, Any]) -> str:
    """The command and the state of the tree that a result comes from."""
    git, load = result["git"], result["machine"]["load_average"][0]
    dirty = " and local changes" if git["dirty"] else ""
    threads = f" {result['threads']} threads," if "threads" in result else ""
    return (
        f"`{result['command']}`, commit {(git['commit'] or 'unknown')[:12]}{dirty},{threads} "
        f"load average at the start {load}."
    )


def grid(heads: list[str], lines: list[list[str]]) -> list[str]:
    """The lines of a markdown table."""
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *lines)]


def main(paths: list[str]) -> None:
    """Print every result file given."""
    if not paths:
        sys.exit("usage: python benchmarks/table.py RESULT.json ...")
    print("\n\n".join(markdown(json.loads(Path(path).read_text())) for path in paths))


if __name__ == "__main__":
    main(sys.argv[1:])
