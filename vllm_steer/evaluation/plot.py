"""Plots of an evaluation: effect and perplexity over strength, and effect over perplexity."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from vllm_steer.evaluation.report import PERPLEXITY, STEERS, EvaluationReport, perplexity_judge
from vllm_steer.evaluation.run import SteerRole
from vllm_steer.picture import COLOURS, label, picture

Panel = Callable[[Any], None]

_STYLES: Final[dict[str, dict[str, Any]]] = {
    "steer": {"marker": "o", "linestyle": "-"},
    "random": {"marker": "s", "linestyle": "--", "alpha": 0.6, "markerfacecolor": "none"},
}
_SMOOTH: Final = 200


def draw_report(report: EvaluationReport, path: Path) -> None:
    """Write a PNG with one panel per pair of quantities that the report has.

    Raises ``SteerError`` without matplotlib and if the file cannot be written.
    """
    panels = _panels(report)
    size = (4.6 * max(1, len(panels)), 4.0)
    title = label(f"{report.metadata['steer']['file']} on {report.metadata['model']}")
    with picture(path, figsize=size, layout="constrained") as figure:
        axes = figure.subplots(1, max(1, len(panels)), squeeze=False)[0]
        for axis, panel in zip(axes, panels, strict=False):
            panel(axis)
            axis.grid(color="0.92")
            if axis.get_legend_handles_labels()[1]:
                axis.legend(frameon=False, fontsize=8)
        figure.suptitle(title, fontsize=10)


def _panels(report: EvaluationReport) -> list[Panel]:
    effects = [(judge.name, judge.effect) for judge in report.judges if judge.effect is not None]
    perplexity = perplexity_judge(report)
    panels: list[Panel] = []
    if effects:
        panels.append(lambda axis: _effects(axis, report, effects))
    if perplexity is not None:
        panels.append(lambda axis: _perplexity(axis, report, perplexity))
    if effects and perplexity is not None:
        panels.append(lambda axis: _trade(axis, report, effects, perplexity))
        panels.append(lambda axis: _normalised(axis, report))
    return panels


def _effects(axis: Any, report: EvaluationReport, effects: Sequence[tuple[str, str]]) -> None:
    for index, (judge, effect) in enumerate(effects):
        for steer in STEERS:
            _line(axis, report.strengths, report.curve(judge, steer, effect), index, steer, judge)
    axis.set(xlabel="strength", ylabel="effect", title="effect")


def _perplexity(axis: Any, report: EvaluationReport, judge: str) -> None:
    for steer in STEERS:
        _line(axis, report.strengths, report.curve(judge, steer, PERPLEXITY), 0, steer, "")
    axis.set(xlabel="strength", ylabel="total perplexity", title=label(judge))
    _use_log_scale(axis.yaxis, axis.set_yscale)


def _trade(
    axis: Any, report: EvaluationReport, effects: Sequence[tuple[str, str]], perplexity: str
) -> None:
    for index, (judge, effect) in enumerate(effects):
        for steer in STEERS:
            across = report.curve(perplexity, steer, PERPLEXITY)
            _line(axis, across, report.curve(judge, steer, effect), index, steer, judge)
    axis.set(xlabel="total perplexity", ylabel="effect", title="effect's price")
    _use_log_scale(axis.xaxis, axis.set_xscale)


def _normalised(axis: Any, report: EvaluationReport) -> None:
    """Points of the perplexity-normalised effect and their fitted curves."""
    for index, (judge, by_steer) in enumerate(report.normalised.items()):
        for steer, fit in by_steer.items():
            if isinstance(fit, str):
                continue
            colour, style = COLOURS[index % len(COLOURS)], _STYLES[steer]
            text = label(f"{judge} {steer}: {fit.pnes:.2f}")
            points = {**style, "linestyle": "none", "color": colour}
            axis.plot(fit.strengths, fit.y, label=text, **points)
            x = _dense_strengths(fit.strengths)
            axis.plot(x, fit.curve(x), color=colour, linestyle=style["linestyle"], linewidth=1)
    axis.set(xlabel="strength", ylabel="effect / perplexity ratio", title="normalised, with PNES")


def _use_log_scale(axis: Any, set_scale: Callable[[str], object]) -> None:
    """Use a logarithmic axis if the values span a decade or more; below, it has too few ticks."""
    low, high = axis.get_data_interval()
    if 0 < 10 * low <= high:
        set_scale("log")


def _dense_strengths(strengths: Sequence[float]) -> list[float]:
    """Strengths on a dense grid, for a smooth curve."""
    first, last = strengths[0], strengths[-1]
    return [first + (last - first) * i / _SMOOTH for i in range(_SMOOTH + 1)]


def _line(
    axis: Any, x: Sequence[float], y: Sequence[float], index: int, steer: SteerRole, judge: str
) -> None:
    text = label(f"{judge} {steer}".strip())
    axis.plot(x, y, label=text, color=COLOURS[index % len(COLOURS)], **_STYLES[steer])
