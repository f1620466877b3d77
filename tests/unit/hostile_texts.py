"""Hostile texts for the terminal, and a check that they have no effect."""

import re
from typing import Final

_OWN_STYLES: Final = re.compile(r"\x1b\[(?!38;5;199m)[0-9;]*m|\x1b\[\??[0-9]*[A-Khl]")
"""What Rich writes for colours of our own words, and for a bar that moves."""

HOSTILE: Final = {
    "markup": "[red]alarm[/red]",
    "closing": "[/]",
    "link": "[link=file:///etc/passwd]x[/link]",
    "handler": "[@click=quit]x[/]",
    "emoji": ":smile:",
    "escape": "\x1b[38;5;199mx\x1b[2J",
    "osc-link": "\x1b]8;;file:///etc/passwd\x1b\\x\x1b]8;;\x1b\\",
    "osc-title": "\x1b]0;title\x07",
    "bell": "\x07",
    "c1": "\x9b38;5;199mx",
    "bidi": "\u202egnp.exe\u2066",
    "invisible": "a\u200bb\u00adc\ufeff",
    "lines": "a\r\nb\x0bc\u2028d",
    "formula": "$x_{$ \\frac{1}$",
    "braces": "{task.fields[x]} {0}",
    "letters": "naïve, 中文, עברית",
    "long": "x" * 400_000,
}
SURROGATE: Final = "\udc9b\udcff\ud800"


def assert_shown(output: str) -> None:
    """Nothing in the output is a command to a terminal that is not our own."""
    plain_output = _OWN_STYLES.sub("", output)
    strange = {
        letter for letter in plain_output if not letter.isprintable() and letter not in "\r\n"
    }
    assert not strange, (strange, plain_output[:500])
