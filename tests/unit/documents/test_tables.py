"""Tables on a terminal and in Markdown: alignment, number formats, separator lines."""

import math

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


def test_numbers_stand_on_the_right_in_the_form_of_their_column() -> None:
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


def test_lines_stand_after_the_rows_that_are_named() -> None:
    assert len(printed(Table("", COLUMNS, ROWS, lines=(0,)))) == len(ROWS) + 4 + 1


def test_facts_are_those_that_there_are_and_have_no_headings() -> None:
    values = {"base_model": "m", "description": "", "rank": None, "layers": [], "columns": 0}
    assert printed(facts("", values))[1:-1] == [[" base model ", " m "], [" columns    ", " 0 "]]
