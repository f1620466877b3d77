"""Tables as data, for the terminal and for Markdown.

Cells, titles and headings may be untrusted text: ``cli.terminal.Console`` prints each string
literally, and ``markdown`` escapes Markdown syntax.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from rich.columns import Columns
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.styled import Styled
from rich.table import Table as RichTable

from vllm_steer.markdown import markdown_row, markdown_text

NARROW: Final = 110
"""Columns of a terminal below which a table with a column of long texts has no grid."""


class StyledText(NamedTuple):
    """A cell with a style of Rich; Markdown ignores the style."""

    text: str
    style: str


@dataclass(frozen=True)
class Column:
    """A column of texts, left-aligned, or, with a ``form``, of numbers, right-aligned.

    ``form`` is a format specification or a function. Strings are unchanged in both; None is empty
    and NaN is ``-``. A column with ``wrap`` False is not wrapped in a narrow terminal.
    """

    heading: str
    form: str | Callable[[Any], str] | None = None
    wrap: bool = True

    def text(self, cell: Any) -> str:
        """The text of a cell."""
        if isinstance(cell, StyledText):
            return cell.text
        if cell is None or isinstance(cell, str):
            return cell or ""
        if isinstance(cell, float) and math.isnan(cell):
            return "-"
        return self.form(cell) if callable(self.form) else format(cell, self.form or "")


@dataclass(frozen=True)
class Table:
    """A title, columns and rows, with a separator line after each row index in ``lines``.

    In a terminal of fewer than ``NARROW`` columns a table with ``text_column``, the index of a
    column of long texts, has no grid: each row is its short texts, a line of its figures, and the
    long text below.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    lines: Collection[int] = ()
    text_column: int | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table for a ``cli.terminal.Console``; without headings it has no header row."""
        if self.text_column is None or options.max_width >= NARROW:
            yield self._grid()
        else:
            yield from self._records(self.text_column)

    def _records(self, text_column: int) -> Iterator[RenderableType]:
        if self.title:
            yield Styled(self.title, "bold")
        for index, row in enumerate(self.rows):
            cells = list(zip(self.columns, row, strict=True))
            _, long_text = cells.pop(text_column)
            names = [_rich_cell(c, v) for c, v in cells if c.form is None and c.text(v)]
            figures = [f"{c.heading} {c.text(v)}" for c, v in cells if c.form is not None]
            yield Columns(names, padding=(0, 2))
            for line in ("  ".join(figures), self.columns[text_column].text(long_text)):
                if line:
                    yield Padding(line, (0, 0, 0, 2))
            if index in self.lines:
                yield ""
        if self.caption:
            yield Styled(self.caption, "italic")

    def _grid(self) -> RichTable:
        table = RichTable(
            title=self.title or None,
            title_justify="left",
            caption=self.caption or None,
            show_header=any(column.heading for column in self.columns),
        )
        for column in self.columns:
            table.add_column(
                column.heading,
                justify="left" if column.form is None else "right",
                overflow="fold",
                no_wrap=not column.wrap,
            )
        for index, row in enumerate(self.rows):
            table.add_row(*map(_rich_cell, self.columns, row), end_section=index in self.lines)
        return table

    def markdown(self) -> list[str]:
        """The lines of a Markdown section: a heading and the table."""
        marks = " | ".join("---" if column.form is None else "---:" for column in self.columns)
        rows = (map(Column.text, self.columns, row) for row in self.rows)
        return [
            *("", f"## {markdown_text(self.title)}", ""),
            markdown_row(column.heading for column in self.columns),
            f"| {marks} |",
            *map(markdown_row, rows),
        ]


def facts(title: str, values: Mapping[str, Any]) -> Table:
    """A table of names and values; empty values are omitted."""
    present = {name: value for name, value in values.items() if value not in (None, "", [])}
    rows = [(name.replace("_", " "), str(value)) for name, value in present.items()]
    return Table(title, (Column(""), Column("")), rows)


def figure(value: float) -> str:
    """A number in a report: three decimals, or three significant digits from 1000 on."""
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.3g}"


def figure_with_error(value: float, error: float) -> str:
    """A number with its standard error, such as ``0.812 ± 0.02``; without it if the error is NaN,
    and ``-`` for NaN.
    """
    if math.isnan(value):
        return "-"
    if math.isnan(error):
        return figure(value)
    return f"{figure(value)} ± {error:.1g}" if error < 10 else f"{figure(value)} ± {error:.0f}"


def markdown_list(items: Iterable[str]) -> list[str]:
    """The lines of a Markdown list, after an empty line."""
    return ["", *(f"- {markdown_text(item)}" for item in items)]


def _rich_cell(column: Column, cell: Any) -> str | Styled:
    text = column.text(cell)
    return Styled(text, cell.style) if isinstance(cell, StyledText) else text
