"""Speed ratios over the batch size, as a picture.

    python benchmarks/plot.py RESULT.json ... --out benchmarks/results/speed-ratio.png

Takes result files of ``speed_ratio.py`` for one shape and dtype. On the left LM-Steer, a line for
each number of distinct steers, with the ratio that the bytes moved predict, dashed; on the right
the other figures. Points are medians over the rounds, bars reach from p20 to p80. Where several
files have the same case, the line joins the newest file's points and those of the others are pale.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's
MARKERS = ("o", "s", "^", "D", "v", "P")
PREDICTED = {"linestyle": "--", "linewidth": 1, "alpha": 0.8}
OTHERS = ("guided", "rotated", "idle", "loaded", "unused")

Line = dict[str, Any]
Series = dict[str, list[Line]]


class ResultError(ValueError):
    """A file that cannot be drawn, or not together with the others."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, draw, write."""
    args = _arguments(arguments)
    try:
        results = [read_result(path) for path in args.results]
        figure = draw(results)
    except ResultError as error:
        sys.exit(f"plot.py: {error}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=150)


def read_result(path: Path) -> dict[str, Any]:
    """A result of ``speed_ratio.py``; ``ResultError`` for anything else."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ResultError(f"{path} cannot be read as JSON: {error}") from error
    found = result.get("benchmark") if isinstance(result, dict) else None
    if found != "speed_ratio":
        raise ResultError(f"{path} is a result of {found!r}; wanted is one of 'speed_ratio'")
    return result


def draw(results: Sequence[dict[str, Any]]) -> Figure:
    """Both panels, or the one that has figures; ``ResultError`` for results of several models."""
    models = sorted({f"{result['shape']} in {result['dtype']}" for result in results})
    if len(models) > 1:
        raise ResultError(f"results of one shape and dtype are wanted, these are {models}")
    results = sorted(results, key=lambda result: result["date"])
    panels = {
        "LM-Steer, every row steered": lm_steer_series(results),
        "guidance; idle and unused: no row steered": other_series(results),
    }
    panels = {heading: series for heading, series in panels.items() if series}
    if not panels:
        raise ResultError("there is no figure in these results")
    figure = Figure(figsize=(1 + 5 * len(panels), 4.8), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (heading, series) in zip(axes, panels.items(), strict=True):
        _draw_panel(axis, heading, series)
    axes[0].set_ylabel("decode step time, steered / unsteered")
    figure.suptitle(title(results), fontsize=10)
    return figure


def lm_steer_series(results: Iterable[dict[str, Any]]) -> Series:
    """Lines of the figure `steered`, by their number of distinct steers."""
    lines = [line for line in _lines(results) if line["name"] == "steered"]
    ranks = sorted({line["rank"] for line in lines})
    return {
        _label(count, rank, ranks): found
        for rank in ranks
        for count in sorted({line["distinct"] for line in lines})
        if (found := [x for x in lines if (x["distinct"], x["rank"]) == (count, rank)])
    }


def other_series(results: Iterable[dict[str, Any]]) -> Series:
    """Lines of the other figures, by their names."""
    lines = list(_lines(results))
    series = {name: [line for line in lines if line["name"] == name] for name in OTHERS}
    return {name: found for name, found in series.items() if found}


def title(results: Sequence[dict[str, Any]]) -> str:
    """What was measured, on which machines, with which versions and when."""
    first = results[0]
    machines = sorted({_machine(result["machine"]) for result in results})
    versions = sorted(
        {
            f"vLLM {result['versions']['vllm']}, torch {result['versions']['torch']}"
            for result in results
        }
    )
    dates = sorted({result["date"][:10] for result in results})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    where = "; ".join(machines + versions)
    return f"{first['shape']}, {first['dtype']}, median and p20 to p80\n{where}, {when}"


def _draw_panel(axis: Axes, heading: str, series: Series) -> None:
    rows = sorted({line["rows"] for lines in series.values() for line in lines})
    axis.axhline(1, color="0.6", linewidth=0.8, zorder=0)
    for index, (label, lines) in enumerate(series.items()):
        shift = 2 ** (0.12 * (index - (len(series) - 1) / 2))  # so that bars do not hide each other
        _draw_series(axis, label, lines, index, shift)
    if any(lines[0]["name"] == "steered" for lines in series.values()):
        axis.plot([], [], color="0.3", label="as the bytes moved predict", **PREDICTED)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(rows))
    axis.xaxis.set_major_formatter(FixedFormatter([str(count) for count in rows]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("rows in the batch")
    axis.set_title(heading, fontsize=10)
    axis.grid(axis="y", color="0.92")
    axis.legend(frameon=False, fontsize=9, loc="best")


def _draw_series(axis: Axes, label: str, lines: Sequence[Line], index: int, shift: float) -> None:
    style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
    newest = {line["rows"]: line for line in lines}
    older = [line for line in lines if line is not newest[line["rows"]]]
    joined = [newest[rows] for rows in sorted(newest)]
    _draw_points(axis, joined, shift, label=label, linewidth=1.4, **style)
    if older:
        _draw_points(axis, older, shift, linestyle="none", alpha=0.35, **style)
    if lines[0]["name"] == "steered":
        places = [line["rows"] * shift for line in joined]
        predicted = [line["predicted_ratio"] for line in joined]
        axis.plot(places, predicted, marker="_", markersize=14, color=style["color"], **PREDICTED)


def _draw_points(axis: Axes, lines: Sequence[Line], shift: float, **style: Any) -> None:
    medians = [line["ratio_median"] for line in lines]
    bars = [
        [line["ratio_median"] - line["ratio_p20"] for line in lines],
        [line["ratio_p80"] - line["ratio_median"] for line in lines],
    ]
    places = [line["rows"] * shift for line in lines]
    axis.errorbar(places, medians, yerr=bars, markersize=5, elinewidth=1.2, capsize=2.5, **style)


def _lines(results: Iterable[dict[str, Any]]) -> Iterable[Line]:
    return (line for result in results for line in result["rows"])


def _label(count: int, rank: int, ranks: Sequence[int]) -> str:
    steers = f"{count} steer" if count == 1 else f"{count} distinct steers"
    return f"{steers}, rank {rank}" if len(ranks) > 1 or count == 1 else steers


def _machine(machine: dict[str, Any]) -> str:
    return machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json")
    parser.add_argument("--out", type=Path, required=True, metavar="PICTURE.png")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
