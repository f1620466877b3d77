"""Plots of a comparison: strength over tokens, and accuracy over perplexity."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from vllm_steer.evaluation.composition.curves import scheduled_curve
from vllm_steer.evaluation.composition.measurement import RowResult
from vllm_steer.evaluation.composition.report import ComparisonReport
from vllm_steer.evaluation.composition.spec import Combination
from vllm_steer.evaluation.composition.spec import label as name_of
from vllm_steer.evaluation.report import PERPLEXITY
from vllm_steer.picture import COLOURS, label, picture

_THIN: Final = {"fixed": ":", "start": "-.", "dim": "--"}
_MARKS: Final = {"none": "x", "fixed": "s", "start": "v", "dim": "D", "dynamic": "o"}
_COLUMNS: Final = 4


def draw_strengths(report: ComparisonReport, path: Path) -> None:
    """Write a PNG with one panel per property: its strength at each token.

    A dynamic strength is drawn as the mean over texts with a band between the quartiles, for each
    combination with the property; thin lines are the strengths of the other methods.

    Raises ``SteerError`` without matplotlib and if the file cannot be written.
    """
    names = list(report.spec.properties)
    with _panels(len(names), path) as axes:
        for axis, name in zip(axes, names, strict=True):
            _strengths(axis, report, name)


def draw_prices(report: ComparisonReport, path: Path) -> None:
    """Write a PNG with one panel per combination: share of texts with all properties over
    perplexity.

    Raises ``SteerError`` as ``draw_strengths`` does.
    """
    combinations = report.spec.combinations
    with _panels(len(combinations), path) as axes:
        for axis, combination in zip(axes, combinations, strict=True):
            _prices(axis, report.of(combination), combination, combination in report.spec.seen)


def _strengths(axis: Any, report: ComparisonReport, name: str) -> None:
    rows = [result for result in report.rows if name in result.curves]
    for index, result in enumerate(rows):
        _band(axis, result, name, COLOURS[index % len(COLOURS)])
    _stated(axis, report, name, report.metadata["sampling"]["max_tokens"])
    axis.axhline(0, color="0.8", linewidth=0.6)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set(xlabel="token", ylabel="strength", title=label(name))


def _band(axis: Any, result: RowResult, name: str, colour: str) -> None:
    curve = result.curves[name]
    tokens = range(len(curve.mean))
    text = f"dynamic, {name_of(result.row.candidate.combination)}"
    axis.plot(tokens, curve.mean, color=colour, label=label(text))
    axis.fill_between(tokens, curve.lower, curve.upper, color=colour, alpha=0.2, linewidth=0)


def _stated(axis: Any, report: ComparisonReport, name: str, length: int) -> None:
    for method, line in _THIN.items():
        choice = next((c for m, c in report.selected.methods.items() if m == method), None)
        if choice is None:
            continue
        dose, steer = choice.doses[name], report.steers[name]
        if method != "fixed" and dose.get("schedule") != method:
            continue
        values = scheduled_curve(dose, steer, length)
        axis.plot(range(length), values, line, color="0.3", linewidth=0.9, label=method)


def _prices(axis: Any, rows: Sequence[RowResult], combination: Combination, seen: bool) -> None:
    for index, result in enumerate(rows):
        figures = next(f for f in result.judges.values() if PERPLEXITY in f)
        method = result.row.candidate.method
        hollow = {"markerfacecolor": "none"} if result.row.title != method else {}
        axis.plot(
            [figures[PERPLEXITY]],
            [result.accuracy.share],
            _MARKS[method],
            color=COLOURS[index % len(COLOURS)],
            label=label(result.row.title),
            **hollow,
        )
    title = label(f"{name_of(combination)} ({'seen' if seen else 'unseen'})")
    axis.set(xlabel="total perplexity", ylabel="share with all", title=title, ylim=(-0.05, 1.05))


@contextmanager
def _panels(count: int, path: Path) -> Iterator[Sequence[Any]]:
    """Axes for ``count`` panels, at most four per row; the exit writes the PNG."""
    columns = min(count, _COLUMNS)
    rows = -(-count // columns)
    size = (4.6 * columns, 4.0 * rows)
    with picture(path, figsize=size, layout="constrained") as figure:
        axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
        for unused in axes[count:]:
            unused.set_axis_off()
        yield axes[:count]
        for axis in axes[:count]:
            axis.grid(color="0.92")
            if axis.get_legend_handles_labels()[1]:
                axis.legend(frameon=False, fontsize=7)
