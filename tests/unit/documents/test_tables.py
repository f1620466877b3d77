"""Tables on a terminal and in Markdown: alignment, number formats, separator lines."""

import io
import math

import pytest

from vllm_steer.cli.terminal import Console
from vllm_steer.tables import Column, StyledText, Table, facts, figure

COLUMNS = (Column("method"), Column("share", figure), Column("count", "d"))
ROWS = (("none", 0.5, 3), ("[red]", math.nan, None), (StyledText("dim", "bold"), 12345.0, "many"))


def printed(table: Table) -> list[list[str]]:
    console = Console(width=60)
    with console.capture() as output:
        console.print(table)
    lines = output.get().replace("┃", "│").splitlines()
    return [line.split("│")[1:-1] if "│" in line else [line] for line in lines]


def test_numbers_are_right_aligned_in_the_format_of_their_column() -> None:
    title, _, *rows, _ = printed(Table("a [b]", COLUMNS, ROWS))
    assert title[0].rstrip() == "a [b]"
    assert rows == [
        [" method ", "    share ", " count "],
        [rows[1][0]],
        [" none   ", "    0.500 ", "     3 "],
        [" [red]  ", "        - ", "       "],
        [" dim    ", " 1.23e+04 ", "  many "],
    ]


def test_markdown_has_the_same_cells() -> None:
    assert Table("a|b", COLUMNS, ROWS).markdown() == [
        "",
        "## a\\|b",
        "",
        "| method | share | count |",
        "| --- | ---: | ---: |",
        "| none | 0.500 | 3 |",
        "| \\[red\\] | - |  |",
        "| dim | 1.23e+04 | many |",
    ]


def test_lines_follow_the_named_rows() -> None:
    assert len(printed(Table("", COLUMNS, ROWS, lines=(0,)))) == len(ROWS) + 4 + 1


def test_a_table_of_facts_shows_existing_facts_without_headings() -> None:
    values = {"base_model": "m", "description": "", "rank": None, "layers": [], "columns": 0}
    assert printed(facts("", values))[1:-1] == [[" base model ", " m "], [" columns    ", " 0 "]]


def test_a_narrow_terminal_shows_figures_in_a_line_and_the_long_text_below() -> None:
    long = "word " * 30 + "[b]end[/b]"
    table = Table(
        "Title",
        [Column("name"), Column("share", ".0%"), Column("text")],
        [("first", 0.5, long), ("second [2]", 1.0, "short")],
        text_column=2,
    )
    outputs = {}
    for width in (80, 120):
        console = Console(width=width, file=io.StringIO(), record=True)
        console.print(table)
        outputs[width] = console.export_text()
    lines = [line.rstrip() for line in outputs[80].splitlines()]
    assert lines[:4] == ["Title", "first", "  share 50%", "  " + " ".join(["word"] * 15)]
    assert lines[-3:] == ["second [2]", "  share 100%", "  short"]
    assert "[b]end[/b]" in outputs[80] and all(len(line) <= 80 for line in lines)
    assert "│" in outputs[120] and "│" not in outputs[80]


WIDE = Table(
    "perplexity:folder/of/a/model/with/a/long/name",
    [Column("judge"), *(Column(f"total perplexity {n}", figure) for n in range(4))],
    [("classifier:folder/of/a/model:LABEL", *["123.456 ± 0.02"] * 4)],
)


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        # As it is; headings broken; a line of names and lines of figures.
        (110, "┃ total perplexity 0 ┃ total perplexity 1 ┃"),
        (90, "┃          total ┃          total ┃"),
        (
            60,
            "classifier:folder/of/a/model:LABEL\n"
            "  total perplexity 0 123.456 ± 0.02\n  total perplexity 1 123.456 ± 0.02\n",
        ),
        (
            72,
            "classifier:folder/of/a/model:LABEL\n"
            "  total perplexity 0 123.456 ± 0.02  total perplexity 1 123.456 ± 0.02\n"
            "  total perplexity 2 123.456 ± 0.02  total perplexity 3 123.456 ± 0.02\n",
        ),
    ],
)
def test_a_number_and_a_title_are_in_one_line_at_any_width(width: int, expected: str) -> None:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(WIDE)
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert lines[0] == WIDE.title
    assert expected in "\n".join(lines) + "\n"
    assert "\n".join(lines).count("123.456 ± 0.02") == 4


def test_a_standard_error_in_a_terminal_of_ascii_alone() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Console(width=40, file=file).print(
        Table("t", [Column("judge"), Column("share", figure)], [("mine", "0.500 ± 0.1")])
    )
    file.seek(0)
    assert "mine" in (text := file.read()) and "0.500 +- 0.1" in text


def test_a_long_name_in_a_table_without_a_grid_is_whole() -> None:
    name = "classifier:/data/models/some-organisation/some-long-model:POSITIVE"
    columns = [Column("judge"), *(Column(f"share {n}", ".6f") for n in range(4))]
    console = Console(width=30, file=io.StringIO(), record=True)
    console.print(Table("t", columns, [(name, *[0.123456] * 4)]))
    assert name in "".join(console.export_text().split())
