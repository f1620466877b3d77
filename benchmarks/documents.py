"""The tables in the documents, made from the result files: ``python -m benchmarks.documents``.

A document holds a table between two comments, ``<!-- table: NAME -->`` (or ``summary``) and
``<!-- end -->``, where NAME is a file in ``benchmarks/results``; for ``versions`` it is a folder.
``<!-- names: wrapped -->`` holds the names of vLLM that are wrapped.
"""

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.architectures.table import architectures
from benchmarks.real_model.plot import draw_french
from benchmarks.real_model.tables import real_model
from benchmarks.table import markdown, summary
from benchmarks.versions import versions
from benchmarks.vllm_names import wrapped

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    ROOT / "benchmarks" / "README.md",
    ROOT / "docs" / "benchmarks.md",
    ROOT / "docs" / "compatibility.md",
    ROOT / "docs" / "compose.md",
    ROOT / "docs" / "design.md",
    ROOT / "docs" / "loading.md",
    ROOT / "docs" / "models.md",
    ROOT / "docs" / "real-model.md",
)
RESULTS = ROOT / "benchmarks" / "results"
MAKERS = {
    "table": markdown,
    "summary": summary,
    "versions": versions,
    "architectures": architectures,
    "real-model": real_model,
}
BLOCK = re.compile(
    r"(<!-- (table|summary|versions|names|architectures|real-model): (\S+) -->\n)"
    r".*?(<!-- end -->)",
    re.S,
)


def filled(text: str) -> str:
    """A document's text with every table made from its result file."""

    def fill(block: re.Match[str]) -> str:
        start, kind, name, end = block.groups()
        table = wrapped() if kind == "names" else MAKERS[kind](_read(RESULTS / name))
        return f"{start}\n{table}\n\n{end}"

    return BLOCK.sub(fill, text)


def _read(path: Path) -> Any:
    """Read a result file, or all result files of a folder."""
    if path.is_dir():
        return [_read(file) for file in path.glob("*.json")]
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    """Rewrite the tables of all documents, and the picture of one."""
    for path in DOCUMENTS:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
    french = "real-model-french"
    draw_french(_read(RESULTS / f"{french}.json"), ROOT / "docs" / "images" / f"{french}.png")


if __name__ == "__main__":
    main()
