"""The tables of ``gate.py``."""

from collections.abc import Mapping
from typing import Any, Final

from benchmarks.real_model.page import document, pm, table

Line = Mapping[str, Any]
KINDS: Final = {
    ("french", True): "French",
    ("french", False): "English",
    ("negative", True): "negative review",
    ("negative", False): "positive review",
}


def gate_tables(data: Line) -> str:
    """The tables of a result as Markdown."""
    return document(
        data,
        "The requests that were steered:",
        _conditions(data["rows"]),
        "Whose tokens a request behind a condition has, exactly:",
        _exact(data["rows"]),
        "The language of the greedy answers, with the condition by cosine at the last token:",
        _effects(data["effects"]),
    )


def _conditions(rows: list[Line]) -> str:
    heads = ("condition", "similarity", "tokens", "layer", "precision", "recall", "F1", "counted")
    cells = [
        [
            *_names(row),
            str(row["layer"]),
            pm(row, "precision"),
            pm(row, "recall"),
            pm(row, "f1"),
            f"{row['as_unsteered'] + row['as_always']} of {row['requests']}",
        ]
        for row in rows
    ]
    return table(heads, cells)


def _exact(rows: list[Line]) -> str:
    heads = (
        "condition",
        "similarity",
        "tokens",
        "as unsteered",
        "as always steered",
        "as both",
        "as neither",
        "other verdict in Hugging Face",
    )
    counts = ("as_unsteered", "as_always", "as_both", "as_neither", "unexpected")
    return table(heads, [[*_names(row), *(str(row[name]) for name in counts)] for row in rows])


def _names(row: Line) -> list[str]:
    return [row["gate"], f"`{row['similarity']}`", f"`{row['tokens']}`"]


def _effects(rows: list[Line]) -> str:
    heads = ("prompt", "steered", "French", "English")
    cells = [
        [
            KINDS[row["gate"], row["is_positive"]],
            _way(row["way"]),
            pm(row, "fr"),
            pm(row, "en"),
        ]
        for row in rows
    ]
    return table(heads, cells)


def _way(name: str) -> str:
    return {"unsteered": "never", "always": "always"}.get(name, "if the condition holds")
