"""The tables in the documents, made from the result files: ``python benchmarks/documents.py``.

A document holds a table between two comments, ``<!-- table: NAME -->`` (or ``summary``) and
``<!-- end -->``, where NAME is a file in ``benchmarks/results``.
"""

import json
import re
from pathlib import Path

from table import markdown, summary

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "docs" / "compose.md",
)
MAKERS = {"table": markdown, "summary": summary}
BLOCK = re.compile(r"(<!-- (table|summary): (\S+) -->\n).*?(<!-- end -->)", re.S)


def filled(text: str) -> str:
    """A document's text with every table as its result file gives it."""

    def fill(block: re.Match[str]) -> str:
        start, kind, name, end = block.groups()
        result = json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))
        return f"{start}\n{MAKERS[kind](result)}\n\n{end}"

    return BLOCK.sub(fill, text)


def main() -> None:
    """Write the tables of all documents anew."""
    for path in DOCUMENTS:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
