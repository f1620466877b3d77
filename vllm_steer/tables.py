"""Tables as data, for the terminal and for Markdown.

Cells, titles and headings may be untrusted text: ``cli.terminal.Console`` prints each string
literally, and ``markdown`` escapes Markdown syntax.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from rich.cells import cell_len
from rich.columns import Columns
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.styled import Styled
from rich.table import Table as RichTable

from vllm_steer.markdown import markdown_row, markdown_text

NARROW: Final = 110
"""Columns of a terminal below which a table with a column of long texts has no grid."""

_NARROWEST_TEXT: Final = 16


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

    Numbers are never broken over lines. Where a terminal is too narrow for them the headings are
    broken, and where it still is, or has fewer than ``NARROW`` columns and the table a
    ``text_column``, the index of a column of long texts, there is no grid: each row is its short
    texts, a line of its figures, and the long text below.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    lines: Collection[int] = ()
    text_column: int | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table for a ``cli.terminal.Console``; without headings it has no header row."""
        table = self._in_ascii() if options.ascii_only else self
        yield from table._rendered(options.max_width)

    def _in_ascii(self) -> "Table":
        """The table for a terminal that cannot show ±."""
        rows = [
            [cell.replace("±", "+-") if isinstance(cell, str) else cell for cell in row]
            for row in self.rows
        ]
        return replace(self, rows=rows)

    def _rendered(self, width: int) -> Iterator[RenderableType]:
        if self.title:
            yield Styled(self.title, "bold")
        plain = [column.heading for column in self.columns]
        broken = ["\n".join(heading.split()) for heading in plain]
        headings = plain if self._fits(plain, width) else broken
        is_narrow = self.text_column is not None and width < NARROW
        if is_narrow or not self._fits(headings, width):
            yield from self._records(width)
        else:
            yield self._grid(headings)
        if self.caption:
            yield Styled(self.caption, "italic")

    def _fits(self, headings: Sequence[str], width: int) -> bool:
        """Whether a grid with these headings has room for all numbers in one line each."""
        frame = 3 * len(self.columns) + 1
        cells = list(zip(*self.rows, strict=True)) or [()] * len(self.columns)
        needed = map(_needed_width, self.columns, headings, cells)
        return frame + sum(needed) <= width

    def _records(self, width: int) -> Iterator[RenderableType]:
        for index, row in enumerate(self.rows):
            cells = list(zip(self.columns, row, strict=True))
            long_text = ""
            if self.text_column is not None:
                column, value = cells.pop(self.text_column)
                long_text = column.text(value)
            texts = [(c, v) for c, v in cells if c.form is None and c.text(v)]
            names = [_rich_cell(column, value) for column, value in texts]
            room = sum(cell_len(column.text(value)) + 2 for column, value in texts)
            figures = [f"{c.heading} {c.text(v)}" for c, v in cells if c.form is not None]
            if names and room <= width:
                yield Columns(names, padding=(0, 2))
            else:  # ``Columns`` cuts a text that is too long
                yield from names
            for line in (*_filled(figures, width - 2), long_text):
                if line:
                    yield Padding(line, (0, 0, 0, 2), expand=False)
            if index in self.lines:
                yield ""

    def _grid(self, headings: Sequence[str]) -> RichTable:
        table = RichTable(show_header=any(headings))
        for column, heading in zip(self.columns, headings, strict=True):
            is_text = column.form is None
            table.add_column(
                heading,
                justify="left" if is_text else "right",
                overflow="fold",
                no_wrap=not (column.wrap and is_text),
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


_ROUNDING: Final = 1e-9


def figure_with_error(value: float, error: float) -> str:
    """A number with its standard error, such as ``0.812 ± 0.02``, and ``-`` for NaN.

    Without the error if it is NaN, or 0 up to rounding: all observations are the same then, and say
    nothing of how much others may differ.
    """
    if math.isnan(value):
        return "-"
    if math.isnan(error) or error <= _ROUNDING * max(1.0, abs(value)):
        return figure(value)
    digits = ".2g" if abs(value) >= 1000 else ".1g" if error < 9.5 else ".0f"
    return f"{figure(value)} ± {error:{digits}}"


def markdown_list(items: Iterable[str]) -> list[str]:
    """The lines of a Markdown list, after an empty line."""
    return ["", *(f"- {markdown_text(item)}" for item in items)]


def _filled(texts: Iterable[str], width: int) -> Iterator[str]:
    """Lines of as many texts as have room beside each other; none is broken."""
    line = ""
    for text in texts:
        longer = f"{line}  {text}" if line else text
        if line and cell_len(longer) > width:
            yield line
            longer = text
        line = longer
    yield line


def _needed_width(column: Column, heading: str, cells: Sequence[Any]) -> int:
    """The width that a column needs so that it can be read."""
    longest = max((cell_len(column.text(cell)) for cell in cells), default=0)
    if column.form is None and column.wrap:
        longest = min(longest, _NARROWEST_TEXT)
    return max(longest, *map(cell_len, heading.split("\n")))


def _rich_cell(column: Column, cell: Any) -> str | Styled:
    text = column.text(cell)
    return Styled(text, cell.style) if isinstance(cell, StyledText) else text
