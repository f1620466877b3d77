"""Result files as tables: ``python benchmarks/table.py RESULT.json ...`` prints markdown."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

HEADINGS = (
    "figure",
    "rows",
    "distinct",
    "rank",
    "A, ms",
    "B, ms",
    "ratio B/A",
    "p20 to p80",
    "by bytes",
)


def cells(line: dict[str, Any]) -> list[str]:
    """One line of a result under ``HEADINGS``."""
    return [
        line["name"],
        str(line["rows"]),
        str(line["distinct"] or "-"),
        str(line["rank"] or "-"),
        f"{line['unsteered_ms']:.2f}",
        f"{line['steered_ms']:.2f}",
        f"{line['ratio_median']:.3f}",
        f"{line['ratio_p20']:.3f} to {line['ratio_p80']:.3f}",
        f"{line['predicted_ratio']:.3f}",
    ]


def title(result: dict[str, Any]) -> str:
    """What was measured, where and with what."""
    machine, versions = result["machine"], result["versions"]
    device = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    return (
        f"{result['shape']}, {result['dtype']}, {device}, vLLM {versions['vllm']}, "
        f"torch {versions['torch']}, {result['date'][:10]}"
    )


def rich_table(result: dict[str, Any]) -> Table:
    """A result for the terminal."""
    table = Table(*HEADINGS, title=title(result))
    for line in result["rows"]:
        table.add_row(*cells(line))
    return table


def markdown(result: dict[str, Any]) -> str:
    """A result as a markdown table under its title, with the command that made it."""
    git, machine = result["git"], result["machine"]
    dirty = " and local changes" if git["dirty"] else ""
    rows = [list(HEADINGS), ["---"] * len(HEADINGS), *map(cells, result["rows"])]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    origin = (
        f"`{result['command']}`, commit {(git['commit'] or 'unknown')[:12]}{dirty}, "
        f"{result['threads']} threads, load average at the start {machine['load_average'][0]}."
    )
    return "\n".join([f"**{title(result)}**", "", *lines, "", origin])


def main(paths: list[str]) -> None:
    """Print every result file given."""
    if not paths:
        sys.exit("usage: python benchmarks/table.py RESULT.json ...")
    print("\n\n".join(markdown(json.loads(Path(path).read_text())) for path in paths))


if __name__ == "__main__":
    main(sys.argv[1:])
