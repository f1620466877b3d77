"""Output to the terminal: the only place where commands print.

Descriptions, tokens, file names, recipes, texts and model names come from outside. Here they are
shown as they are and never obeyed: no markup, no emoji codes, no control characters, no characters
that turn the direction of what follows, and none that the stream cannot carry.
"""

import io
import json
import os
import sys
from typing import IO, Any, Final

from rich.console import Console as RichConsole
from rich.console import JustifyMethod, OverflowMethod, RenderableType
from rich.status import Status
from rich.style import Style
from rich.text import Text

from vllm_steer.untrusted_text import printable

LONGEST: Final = 1000
"""Characters of one text, such as a cell."""


class Console(RichConsole):
    """Rich's console for foreign text: each string, also in tables and titles, is shown plainly."""

    def __init__(self, *, stderr: bool = False, **options: Any) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False, **options)
        protect(self.file)  # Rich itself shortens by a letter that not every encoding has

    def render_str(
        self,
        text: str,
        *,
        style: str | Style = "",
        justify: JustifyMethod | None = None,
        overflow: OverflowMethod | None = None,
        **_: Any,
    ) -> Text:
        """The text that stands for a string wherever one is printed."""
        return Text(self.shown(plain(text)), style=style, justify=justify, overflow=overflow)

    def status(self, status: RenderableType, **options: Any) -> Status:
        """A line that turns while a block runs."""
        shown = self.text(status) if isinstance(status, str) else status
        spinner = "dots" if self.encoding.startswith("utf") else "line"
        return super().status(shown, **{"spinner": spinner, **options})

    def text(self, text: str, style: str = "", longest: int | None = LONGEST) -> Text:
        """A foreign text in a style of our own, for what Rich would else read markup in."""
        return Text(self.shown(plain(text, longest)), style=style)

    def shown(self, text: str) -> str:
        """The text with what this console's stream does not have in Python's notation."""
        return shown_in(text, self.encoding)


def plain(text: str, longest: int | None = LONGEST) -> str:
    """A foreign text as it may be printed; its line breaks stay."""
    return printable(text, longest, lines=True)


def one_line(text: str, longest: int = LONGEST) -> str:
    """The same on one line."""
    return printable(text, longest)


def shown_in(text: str, encoding: str) -> str:
    """The text with what an encoding does not have in Python's notation."""
    return text.encode(encoding, "backslashreplace").decode(encoding)


def say(text: str, *, stderr: bool = False, longest: int | None = LONGEST) -> None:
    """Print a line, without wrapping it."""
    file = sys.stderr if stderr else sys.stdout
    print(shown_in(plain(text, longest), getattr(file, "encoding", None) or "utf-8"), file=file)


def say_json(value: Any) -> None:
    """Print a value as JSON, in ASCII: a terminal shows all of it and obeys none."""
    print(json.dumps(value, indent=2))


def protect_streams() -> None:
    """``protect`` both, and let what is written to one that was closed go nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        protect(getattr(sys, name))


def protect(stream: IO[str]) -> None:
    """Let no text fail, or get through raw, because of the stream's encoding."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
