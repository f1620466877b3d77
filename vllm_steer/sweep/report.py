"""The result of a sweep as plain data, table and plot."""

import math
from pathlib import Path
from typing import Any, Final

from vllm_steer.picture import COLOURS, label, picture
from vllm_steer.steers.layers import format_layers
from vllm_steer.sweep.search import Point, within
from vllm_steer.sweep.sweep_run import SweepResult
from vllm_steer.tables import Column, Table

_DECADE: Final = 10.0


def data(result: SweepResult, best: Point | None, output: Path | None) -> dict[str, Any]:
    """All points in the order of measurement, the selected point and the file written, if any."""
    return {
        **result.metadata,
        "steer": str(result.settings.steer),
        "texts": result.texts,
        "unsteered": result.unsteered.data,
        "points": [
            {**point.data, "within_budget": within(point, result.settings.budget)}
            for point in result.points
        ],
        "chosen": None if best is None else best.data,
        "written": None if output is None else str(output),
    }


def table(result: SweepResult, best: Point | None) -> Table:
    """One row per point, by layers and strength; the selected one is marked."""
    names = list(dict.fromkeys(point.candidate for point in result.points))
    points = sorted(result.points, key=lambda p: (names.index(p.candidate), p.strength))
    rows = [
        (_layers(p), p.strength, p.effect, p.perplexity, p.ratio, _note(p, result, best))
        for p in (result.unsteered, *points)
    ]
    columns = (
        Column("layers"),
        Column("strength", ".5g"),
        Column("effect", ".3f"),
        Column("perplexity", ".4g"),
        Column("ratio", ".3f"),
        Column(""),
    )
    return Table(f"{result.settings.judge}, budget {result.settings.budget:g}", columns, rows)


def _note(point: Point, result: SweepResult, best: Point | None) -> str:
    if point is best:
        return "chosen"
    return "" if within(point, result.settings.budget) else "over budget"


def draw(result: SweepResult, best: Point | None, path: Path) -> None:
    """Write a PNG: effect over perplexity ratio, one line per candidate.

    Raises ``SteerError`` without matplotlib and if the file cannot be written.
    """
    with picture(path, figsize=(6.4, 4.4), layout="constrained") as figure:
        axis = figure.subplots()
        _draw_points(axis, result)
        _draw_frame(axis, result, best)


def _draw_points(axis: Any, result: SweepResult) -> None:
    names = list(dict.fromkeys(point.candidate for point in result.points))
    for index, candidate in enumerate(names):
        points = [p for p in result.points if p.candidate == candidate and math.isfinite(p.ratio)]
        points = sorted([result.unsteered, *points], key=lambda p: abs(p.strength))
        colour = COLOURS[index % len(COLOURS)]
        style: dict[str, Any] = {"marker": "o", "color": colour, "label": label(candidate.name)}
        axis.plot([p.ratio for p in points], [p.effect for p in points], **style)
        for point in points:
            text_style = {"xytext": (4, 5), "textcoords": "offset points", "fontsize": 7}
            axis.annotate(f"{point.strength:.3g}", (point.ratio, point.effect), **text_style)


def _draw_frame(axis: Any, result: SweepResult, best: Point | None) -> None:
    if best is not None:
        style = {"marker": "*", "markersize": 16, "linestyle": "none", "color": "black"}
        axis.plot([best.ratio], [best.effect], label="chosen", zorder=0, **style)
    axis.axvline(result.settings.budget, color="0.5", linestyle="--", linewidth=1, label="budget")
    axis.set(xlabel="perplexity / unsteered", ylabel=label(f"effect: {result.settings.judge}"))
    ratios = [p.ratio for p in result.points if math.isfinite(p.ratio)]
    if ratios and max(ratios) > _DECADE:
        axis.set_xscale("log")
    axis.grid(color="0.92")
    axis.legend(frameon=False, fontsize=8)
    axis.set_title(label(f"{result.settings.steer.name} on {result.settings.model}"), fontsize=10)


def _layers(point: Point) -> str:
    layers = point.candidate.layers
    if layers is None:
        return "-"
    text = format_layers(layers)
    return text if point.candidate.name == text else f"{point.candidate.name} ({text})"
