"""The picture of the page about a real model: price over share of French, strength over tokens."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from vllm_steer.picture import COLOURS, label, picture

_MARKS: Final = {
    "fixed": "s",
    "start": "v",
    "dim": "D",
    "dynamic": "o",
    "dynamic / Q": "P",
    "random": "^",
}


def draw_french(data: Mapping[str, Any], path: Path) -> None:
    """Write a PNG with two panels: what each setting costs, and the dynamic strengths."""
    path.parent.mkdir(exist_ok=True)
    with picture(path, dpi=110, figsize=(9, 3.6), layout="constrained") as figure:
        prices, curves = figure.subplots(1, 2)
        for colour, (method, mark) in zip(COLOURS, _MARKS.items(), strict=False):
            rows = [row for row in data["rows"] if row["method"] == method]
            rows.sort(key=lambda row: row["share"])
            columns = [[row[name] for row in rows] for name in ("share", "log_ratio")]
            errors = {"xerr": [row["share_error"] for row in rows]}
            errors["yerr"] = [row["log_ratio_error"] for row in rows]
            prices.errorbar(
                *columns,
                **errors,
                fmt=mark,
                color=colour,
                markersize=5,
                linewidth=0.8,
                label=method,
            )
        prices.set(
            xlabel="share of French texts", ylabel="mean ln(PPL steered / PPL with demonstrations)"
        )
        prices.legend(fontsize=8)
        for colour, (name, curve) in zip(COLOURS, data["curves"].items(), strict=False):
            tokens = range(len(curve["mean"]))
            is_first = name == next(iter(data["curves"]))
            curves.plot(tokens, curve["mean"], color=colour, linewidth=1.2, label=label(name))
            if is_first:
                curves.fill_between(tokens, curve["lower"], curve["upper"], color=colour, alpha=0.2)
        curves.set(xlabel="token", ylabel="mean strength (band: quartiles)")
        curves.legend(fontsize=7)
