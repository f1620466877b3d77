"""Pictures: figures of matplotlib that are written whole, in which every text is shown as it is."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from vllm_steer.files.atomic_write import write_atomically
from vllm_steer.optional import require_package
from vllm_steer.untrusted_text import printable

COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""That those who see colours differently can tell apart (Okabe and Ito)."""
_LONGEST: Final = 100
_PLAIN: Final = {"text.usetex": False}
"""Whatever the user's settings say: TeX would obey a file's name."""


@contextmanager
def picture(path: str | Path, *, dpi: int = 150, **options: Any) -> Iterator[Any]:
    """A figure to draw on, with matplotlib's ``options``; a PNG at ``path`` when the block ends.

    Raises ``SteerError`` without matplotlib, and if the file cannot be written.
    """
    # A figure of its own draws with Agg and needs no display; pyplot would keep it.
    make = require_package("matplotlib.figure").Figure
    with require_package("matplotlib").rc_context(_PLAIN), warnings.catch_warnings():
        for about_texts in ("Glyph .* missing from", "constrained_layout not applied"):
            warnings.filterwarnings("ignore", message=about_texts)
        figure = make(**options)
        yield figure
        write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=dpi))


def label(text: str) -> str:
    """A text for a title, an axis or a legend: printable, and no formula where it has dollars.

    (The parsing of formulas cannot be turned off as a whole: logarithmic axes are labelled by it.)
    """
    shown = printable(text, _LONGEST).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown  # a legend leaves out what begins so
