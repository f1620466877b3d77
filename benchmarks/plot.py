"""Speed ratios over the batch size, as a picture.

    python -m benchmarks.plot RESULT.json ... --out benchmarks/results/speed-ratio.png

Takes result files of ``speed_ratio.py`` for one shape and dtype. On the left LM-Steer, a line for
each number of distinct steers, with the ratio that the bytes moved predict, dashed; on the right
the other figures. Points are medians over the rounds, bars reach from p20 to p80. Where several
files have the same case, the line joins the newest file's points and those of the others are pale.
"""

import argparse
import json
import sys
from collections.abc import Sequence
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


def main(given: Sequence[str] | None = None) -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json")
    parser.add_argument("--out", type=Path, required=True, metavar="PICTURE.png")
    args = parser.parse_args(given)
    figure = draw([json.loads(path.read_text("utf-8")) for path in args.results])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=150)


def draw(results: Sequence[Line]) -> Figure:
    """Both panels, or the one that has figures; exits for files that do not go together."""
    models = {(result["benchmark"], result["shape"], result["dtype"]) for result in results}
    if len(models) > 1 or min(models)[0] != "speed_ratio":
        sys.exit(f"plot: results of speed_ratio of one shape and dtype are wanted, not {models}")
    results = sorted(results, key=lambda result: result["date"])
    lines = [line for result in results for line in result["rows"]]
    panels = {
        "LM-Steer, every row steered": lm_steer_series(lines),
        "guidance; idle and unused: no row steered": other_series(lines),
    }
    panels = {heading: series for heading, series in panels.items() if series}
    figure = Figure(figsize=(1 + 5 * len(panels), 4.8), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (heading, series) in zip(axes, panels.items(), strict=True):
        _draw_panel(axis, heading, series)
    axes[0].set_ylabel("decode step time, steered / unsteered")
    figure.suptitle(title(results), fontsize=10)
    return figure


def lm_steer_series(lines: Sequence[Line]) -> Series:
    """Lines of the figure `steered`, by their rank and number of distinct steers."""
    steered = [line for line in lines if line["name"] == "steered"]
    series: Series = {}
    ranks = {line["rank"] for line in steered}
    for line in sorted(steered, key=lambda line: (line["rank"], line["distinct"])):
        label = "1 steer" if line["distinct"] == 1 else f"{line['distinct']} distinct steers"
        if len(ranks) > 1 or line["distinct"] == 1:
            label += f", rank {line['rank']}"
        series.setdefault(label, []).append(line)
    return series


def other_series(lines: Sequence[Line]) -> Series:
    """Lines of the other figures, by their names."""
    series = {name: [line for line in lines if line["name"] == name] for name in OTHERS}
    return {name: found for name, found in series.items() if found}


def title(results: Sequence[Line]) -> str:
    """What was measured, on which machines, with which versions and when."""
    first = results[0]
    machines, versions = set(), set()
    for result in results:
        machine, used = result["machine"], result["versions"]
        machines.add(machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores")
        versions.add(f"vLLM {used['vllm']}, torch {used['torch']}")
    dates = sorted({result["date"][:10] for result in results})
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    where = "; ".join([*sorted(machines), *sorted(versions)])
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
    joined = [newest[rows] for rows in sorted(newest)]
    _draw_points(axis, joined, shift, label=label, linewidth=1.4, **style)
    if older := [line for line in lines if line is not newest[line["rows"]]]:
        _draw_points(axis, older, shift, linestyle="none", alpha=0.35, **style)
    if lines[0]["name"] == "steered":
        places = [line["rows"] * shift for line in joined]
        predicted = [line["predicted_ratio"] for line in joined]
        axis.plot(places, predicted, marker="_", markersize=14, color=style["color"], **PREDICTED)


def _draw_points(axis: Axes, lines: Sequence[Line], shift: float, **style: Any) -> None:
    medians = [line["ratio_median"] for line in lines]
    low = [line["ratio_median"] - line["ratio_p20"] for line in lines]
    high = [line["ratio_p80"] - line["ratio_median"] for line in lines]
    places, sizes = [line["rows"] * shift for line in lines], {"markersize": 5, "capsize": 2.5}
    axis.errorbar(places, medians, yerr=[low, high], elinewidth=1.2, **sizes, **style)


if __name__ == "__main__":
    main()
