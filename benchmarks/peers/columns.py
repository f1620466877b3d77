"""The table of a peers result: headings, and each line under them."""

from typing import Any

HEADINGS = (
    "what",
    "shape",
    "rows",
    "rank",
    "unsteered, ms",
    "steered, ms",
    "ratio",
    "p20 to p80",
    "tokens/s",
    "steered over ours",
)


def cells(line: dict[str, Any]) -> list[str]:
    """One line of a result under ``HEADINGS``; a peer left out has no figures."""
    if line["skipped"]:
        return [line["name"], line["shape"], *["-"] * (len(HEADINGS) - 3), "not run"]
    return [
        line["name"],
        line["shape"],
        str(line["rows"]),
        str(line["rank"] or "-"),
        f"{line['unsteered_ms']:.2f}",
        f"{line['steered_ms']:.2f}",
        f"{line['ratio_median']:.3f}",
        f"{line['ratio_p20']:.3f} to {line['ratio_p80']:.3f}",
        f"{line['tokens_per_s']:.0f}",
        _beside(line),
    ]


def reasons(result: dict[str, Any]) -> list[str]:
    """Why peers were left out, a sentence each."""
    return [f"{line['name']}: {line['skipped']}." for line in result["rows"] if line["skipped"]]


def _beside(line: dict[str, Any]) -> str:
    if line["over_ours_median"] is None:
        return "-"
    low, high = line["over_ours_p20"], line["over_ours_p80"]
    return f"{line['over_ours_median']:.2f} ({low:.2f} to {high:.2f})"
