"""Parts of a result on the page about a pretrained model."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.table import grid, origin, title

Line = Mapping[str, Any]


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(grid(headings, rows))


def pm(line: Line, name: str, places: int = 2) -> str:
    """A figure and its standard error; the figure alone where there is no error."""
    value, error = line[name], line.get(f"{name}_error")
    if value is None or value != value:
        return "-"
    if error is None or error != error:
        return f"{value:.{places}f}"
    return f"{value:.{places}f} ± {error:.{places}f}"


def document(data: Mapping[str, Any], *parts: str) -> str:
    """Title, tables and texts, time, command."""
    minutes = sum(data.get("seconds", {}).values()) / 60
    times = [f"{minutes:.0f} minutes."] if minutes else []
    return "\n\n".join((f"**{data['model']}, {title(data)}**", *parts, *times, origin(data)))
