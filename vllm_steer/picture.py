"""PNG files with matplotlib, written atomically, with all texts drawn literally."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from vllm_steer.files.atomic_write import write_atomically
from vllm_steer.optional import require_package
from vllm_steer.untrusted_text import printable

COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""A palette for colour-blind readers (Okabe and Ito)."""
_LONGEST: Final = 100
_PLAIN: Final = {"text.usetex": False}
"""Overrides the user's settings: TeX would interpret a file name."""


@contextmanager
def picture(path: str | Path, *, dpi: int = 150, **options: Any) -> Iterator[Any]:
    """A figure to draw on, with matplotlib's ``options``; the exit writes a PNG to ``path``.

    Raises ``SteerError`` without matplotlib and if the file cannot be written.
    """
    # Figure draws with Agg, without a display; pyplot would keep a reference to it.
    figure_class = require_package("matplotlib.figure").Figure
    with require_package("matplotlib").rc_context(_PLAIN), warnings.catch_warnings():
        for warning in ("Glyph .* missing from", "constrained_layout not applied"):
            warnings.filterwarnings("ignore", message=warning)
        figure = figure_class(**options)
        yield figure
        write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=dpi))


def label(text: str) -> str:
    """A text for a title, an axis or a legend: printable, and with dollar signs escaped.

    (Parsing of formulas cannot be disabled globally: logarithmic axes use it for their labels.)
    """
    printable_text = printable(text, _LONGEST).replace("$", r"\$")
    return (
        f" {printable_text}" if printable_text.startswith("_") else printable_text
    )  # a legend omits labels that begin with _
