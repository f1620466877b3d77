"""Untrusted text in Markdown files, escaped so that it is shown literally."""

import re
from collections.abc import Iterable
from typing import Final

from vllm_steer.untrusted_text import printable

_LONGEST: Final = 1000
_MARKS: Final = re.compile(r"([\\`*_\[\]<>|&~#$@]|:(?=[\w+-]+:))")
_BEGINNING: Final = re.compile(r"^(\d*)([-+.)=])(?=[-+=\s]|$)")
_ADDRESS: Final = re.compile(r"(https?|ftp)://|(www)\.", re.IGNORECASE)


def markdown_text(text: str) -> str:
    """One printable line with every special character of Markdown, HTML and formulas escaped.

    This also covers characters that are special only at the beginning of a line.
    """
    return _BEGINNING.sub(r"\1\\\2", _inline(text))


def markdown_row(cells: Iterable[str]) -> str:
    """A row of a table."""
    return f"| {' | '.join(map(_inline, cells))} |"


def _inline(text: str) -> str:
    marked = _MARKS.sub(r"\\\1", printable(text, _LONGEST).strip())
    return _ADDRESS.sub(_not_linked, marked)


def _not_linked(match: re.Match[str]) -> str:
    return f"{match[1]}\\://" if match[1] else f"{match[2]}\\."
