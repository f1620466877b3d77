"""Terminal output: the only place where commands print.

Descriptions, tokens, file names, recipes, texts and model names are untrusted. They are printed
literally: no markup, no emoji codes, no control characters, no characters that change the text
direction, and none that the stream's encoding lacks.
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
"""Maximum characters of one text, such as a cell."""


class Console(RichConsole):
    """Rich's console for untrusted text: each string, also in tables and titles, is printed
    literally.
    """

    def __init__(self, *, stderr: bool = False, **options: Any) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False, **options)
        protect(self.file)  # Rich's ellipsis is not in every encoding

    def render_str(
        self,
        text: str,
        *,
        style: str | Style = "",
        justify: JustifyMethod | None = None,
        overflow: OverflowMethod | None = None,
        **_: Any,
    ) -> Text:
        """The text that Rich prints for a string."""
        return Text(self.shown(plain(text)), style=style, justify=justify, overflow=overflow)

    def status(self, status: RenderableType, **options: Any) -> Status:
        """A spinner with a status line while a block runs."""
        shown = self.text(status) if isinstance(status, str) else status
        spinner = "dots" if self.encoding.startswith("utf") else "line"
        return super().status(shown, **{"spinner": spinner, **options})

    def text(self, text: str, style: str = "", longest: int | None = LONGEST) -> Text:
        """An untrusted text in a given style, for places where Rich would interpret markup."""
        return Text(self.shown(plain(text, longest)), style=style)

    def shown(self, text: str) -> str:
        """The text, with characters that this console's encoding lacks escaped as in Python."""
        return shown_in(text, self.encoding)


def plain(text: str, longest: int | None = LONGEST) -> str:
    """An untrusted text as it may be printed, with its line breaks."""
    return printable(text, longest, lines=True)


def one_line(text: str, longest: int = LONGEST) -> str:
    """The same on one line."""
    return printable(text, longest)


def shown_in(text: str, encoding: str) -> str:
    """The text, with characters that an encoding lacks escaped as in Python."""
    return text.encode(encoding, "backslashreplace").decode(encoding)


def say(text: str, *, stderr: bool = False, longest: int | None = LONGEST) -> None:
    """Print a line without wrapping."""
    file = sys.stderr if stderr else sys.stdout
    print(shown_in(plain(text, longest), getattr(file, "encoding", None) or "utf-8"), file=file)


def say_json(value: Any) -> None:
    """Print a value as ASCII JSON, so that a terminal interprets none of its characters."""
    print(json.dumps(value, indent=2))


def protect_streams() -> None:
    """``protect`` both streams; output to a closed stream is discarded."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        protect(getattr(sys, name))


def protect(stream: IO[str]) -> None:
    """Escape characters that the stream's encoding lacks instead of raising an error."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
