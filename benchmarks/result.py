"""The result file of a benchmark: its head, its lines, and its table at the end."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.machine import describe_run
from benchmarks.table import markdown

console = Console(stderr=True)


class Result:
    """A description of the run, made before the measurement, and ``rows``.

    The file is rewritten atomically after every line, so an interrupted run keeps its lines.
    """

    def __init__(self, benchmark: str, path: Path, **settings: Any) -> None:
        self._path = path
        self.data: dict[str, Any] = {**describe_run(benchmark), **settings, "rows": []}

    def add(self, line: dict[str, Any], message: str | None = None) -> None:
        """Add a line, write the file, show ``message``."""
        self.data["rows"].append(line)
        self.write()
        if message is not None:
            console.print(message, markup=False, highlight=False, soft_wrap=True)

    def write(self, **settings: Any) -> None:
        """Write the file, with ``settings`` added to its head."""
        self.data.update(settings)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_name(f"{self._path.name}.part")
        beside.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        beside.replace(self._path)

    def show(self) -> None:
        """Print the table to standard output."""
        print(markdown(self.data))
