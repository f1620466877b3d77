"""Plots of a steer's description: norms, singular values and accuracies."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_steer.inspection.description import Description
from vllm_steer.picture import label, picture

_WIDTH, _HEIGHT, _DOTS = 7.0, 3.2, 150


def write_plot(description: Description, path: str | Path) -> None:
    """Write a description as a PNG file, atomically.

    For an ``lm_steer``: the singular values of each free column, else the columns' norms. For a
    ``vector``: the norms per layer, and scores and accuracies if the file has any. For a ``delta``:
    the norms per step, one line per layer. For other kinds: the norms per layer.

    Raises ``SteerError`` if matplotlib is not installed or the file cannot be written.
    """
    panels = _panels(description)
    with picture(path, dpi=_DOTS, figsize=(_WIDTH, _HEIGHT * len(panels))) as figure:
        rows = figure.subplots(len(panels), squeeze=False)[:, 0]
        for axes, panel in zip(rows, panels, strict=True):
            _draw(axes, panel)
        figure.tight_layout()


def _draw(axes: Any, panel: Mapping[str, Any]) -> None:
    for name, (positions, values) in panel["lines"].items():
        axes.plot(positions, values, marker="o", markersize=3, label=label(name))
    axes.set_xlabel(panel["across"])
    axes.set_ylabel(panel["up"])
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(panel["lines"]) > 1:
        axes.legend(fontsize="x-small", ncols=2)


def _panels(description: Description) -> list[Mapping[str, Any]]:
    if description["kind"] == "lm_steer":
        return [_column_panel(description["columns"])]
    if description["kind"] == "delta":
        return [_step_panel(description["layers"])]
    norms = _layer_lines(description["layers"], ["norm"])
    names = {name for row in description["layers"] for name in row} - {"layer", "norm"}
    names = names if description["kind"] == "vector" else set()
    scores = _layer_lines(description["layers"], sorted(names))
    panels = [_panel("layer", "norm", norms)]
    return [*panels, _panel("layer", "accuracy or score", scores)] if scores else panels


def _column_panel(columns: list[Mapping[str, Any]]) -> Mapping[str, Any]:
    free = [column for column in columns if not column["fixed"]]
    lines = {
        f"column {column['column']}": _numbered(column["singular_values"])
        for column in free
        if "singular_values" in column
    }
    if lines:
        return _panel("direction", "singular value", lines)
    positions = [column["column"] for column in columns]
    return _panel("column", "norm", {"norm": (positions, [column["norm"] for column in columns])})


def _step_panel(layers: list[Mapping[str, Any]]) -> Mapping[str, Any]:
    lines = {f"layer {row['layer']}": _numbered(row["norm_per_step"]) for row in layers}
    return _panel("generation step", "norm", lines)


def _layer_lines(layers: list[Mapping[str, Any]], names: list[str]) -> dict[str, Any]:
    lines = {}
    for name in names:
        rows = [row for row in layers if name in row]
        positions, values = [row["layer"] for row in rows], [row[name] for row in rows]
        lines[name.replace("_", " ")] = (positions, values)
    return lines


def _numbered(values: list[float]) -> tuple[list[int], list[float]]:
    return list(range(len(values))), values


def _panel(across: str, up: str, lines: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"across": across, "up": up, "lines": lines}
