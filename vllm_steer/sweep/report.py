"""The result of a sweep: plain data, a table and a figure."""

import math
from pathlib import Path
from typing import Any, Final

from vllm_steer.picture import COLOURS, label, picture
from vllm_steer.steers.layers import format_layers
from vllm_steer.sweep.search import Point, within
from vllm_steer.sweep.sweep_run import SweepResult
from vllm_steer.tables import Column, Table

_DECADE: Final = 10.0


def data(swept: SweepResult, chosen: Point | None, written: Path | None) -> dict[str, Any]:
    """All points in the order they were measured, and which one was taken, if one was."""
    return {
        **swept.settings,
        "steer": str(swept.asked.steer),
        "texts": swept.texts,
        "unsteered": swept.unsteered.data,
        "points": [
            {**point.data, "within_budget": within(point, swept.asked.budget)}
            for point in swept.points
        ],
        "chosen": None if chosen is None else chosen.data,
        "written": None if written is None else str(written),
    }


def table(swept: SweepResult, chosen: Point | None) -> Table:
    """A row for each point, by layers and strength; the one that was taken is marked."""
    names = list(dict.fromkeys(point.candidate for point in swept.points))
    points = sorted(swept.points, key=lambda p: (names.index(p.candidate), p.strength))
    rows = [
        (_layers(p), p.strength, p.effect, p.perplexity, p.ratio, _note(p, swept, chosen))
        for p in (swept.unsteered, *points)
    ]
    columns = (
        Column("layers"),
        Column("strength", ".5g"),
        Column("effect", ".3f"),
        Column("perplexity", ".4g"),
        Column("ratio", ".3f"),
        Column(""),
    )
    return Table(f"{swept.asked.judge}, budget {swept.asked.budget:g}", columns, rows)


def _note(point: Point, swept: SweepResult, chosen: Point | None) -> str:
    if point is chosen:
        return "chosen"
    return "" if within(point, swept.asked.budget) else "over budget"


def draw(swept: SweepResult, chosen: Point | None, path: Path) -> None:
    """Write a PNG: the effect over the ratio of perplexities, a line for each choice of layers.

    Raises ``SteerError`` without matplotlib and where the file cannot be written.
    """
    with picture(path, figsize=(6.4, 4.4), layout="constrained") as figure:
        axis = figure.subplots()
        _draw_points(axis, swept)
        _draw_frame(axis, swept, chosen)


def _draw_points(axis: Any, swept: SweepResult) -> None:
    names = list(dict.fromkeys(point.candidate for point in swept.points))
    for index, candidate in enumerate(names):
        points = [p for p in swept.points if p.candidate == candidate and math.isfinite(p.ratio)]
        points = sorted([swept.unsteered, *points], key=lambda p: abs(p.strength))
        colour = COLOURS[index % len(COLOURS)]
        style: dict[str, Any] = {"marker": "o", "color": colour, "label": label(candidate.name)}
        axis.plot([p.ratio for p in points], [p.effect for p in points], **style)
        for point in points:
            place = {"xytext": (4, 5), "textcoords": "offset points", "fontsize": 7}
            axis.annotate(f"{point.strength:.3g}", (point.ratio, point.effect), **place)


def _draw_frame(axis: Any, swept: SweepResult, chosen: Point | None) -> None:
    if chosen is not None:
        style = {"marker": "*", "markersize": 16, "linestyle": "none", "color": "black"}
        axis.plot([chosen.ratio], [chosen.effect], label="chosen", zorder=0, **style)
    axis.axvline(swept.asked.budget, color="0.5", linestyle="--", linewidth=1, label="budget")
    axis.set(xlabel="perplexity / unsteered", ylabel=label(f"effect: {swept.asked.judge}"))
    ratios = [p.ratio for p in swept.points if math.isfinite(p.ratio)]
    if ratios and max(ratios) > _DECADE:
        axis.set_xscale("log")
    axis.grid(color="0.92")
    axis.legend(frameon=False, fontsize=8)
    axis.set_title(label(f"{swept.asked.steer.name} on {swept.asked.model}"), fontsize=10)


def _layers(point: Point) -> str:
    layers = point.candidate.layers
    if layers is None:
        return "-"
    said = format_layers(layers)
    return said if point.candidate.name == said else f"{point.candidate.name} ({said})"
