"""The tables of ``ablation.py``."""

from collections.abc import Mapping
from typing import Any

from benchmarks.real_model.page import document, pm, table

Line = Mapping[str, Any]
KINDS = {
    "openings": "After the opening of a French answer:",
    "demonstrations": "After French demonstrations:",
}
HEADS = ("setting", "layers", "direction", "French", "English", "greedy", "perplexity", "dist-2")


def ablation_tables(data: Line) -> str:
    """The tables of a result as Markdown."""
    parts = [
        part
        for kind, caption in KINDS.items()
        for part in (caption, _settings([row for row in data["rows"] if row["prompts"] == kind]))
    ]
    return document(data, *parts, "Where the means of both languages lie, by layer:", _layers(data))


def _settings(rows: list[Line]) -> str:
    cells = [
        [
            row["what"],
            row["layers"],
            row["direction"],
            pm(row, "french"),
            pm(row, "english"),
            pm(row, "greedy_french"),
            pm(row, "perplexity", 1),
            pm(row, "dist_2"),
        ]
        for row in rows
    ]
    return table(HEADS, cells)


def _layers(data: Line) -> str:
    columns = (data["french_mean"], data["english_mean"], data["cosine_with_common"])
    rows = [
        [str(layer), f"{french:.0f}", f"{english:.0f}", f"{cosine:.2f}"]
        for layer, (french, english, cosine) in enumerate(zip(*columns, strict=True))
    ]
    return table(["layer", "French", "English", "cosine"], rows)
