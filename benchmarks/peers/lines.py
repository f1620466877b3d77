"""Result lines: one flat dict per case, of the same keys for a figure and for a peer left out."""

from typing import Any

from decode import Comparison

from peers.job import Job

KEYS = (
    "name",
    "shape",
    "rows",
    "distinct",
    "rank",
    "software",
    "unsteered_ms",
    "steered_ms",
    "ratio_median",
    "ratio_p20",
    "ratio_p80",
    "rounds",
    "tokens_per_s",
    "over_ours_median",
    "over_ours_p20",
    "over_ours_p80",
    "skipped",
)


def figure_line(
    job: Job,
    name: str,
    software: str,
    steered: Comparison,
    over_ours: Comparison | None = None,
    *,
    rank: int = 0,
) -> dict[str, Any]:
    """A measured case: ``steered`` is its steered legs over its unsteered ones, ``over_ours`` its
    steered legs over those of vllm-steer in the same process."""
    summary = steered.summary()
    line = {
        "name": name,
        "shape": job.shape,
        "rows": len(steered.plain[0].tokens),
        "distinct": 1,
        "rank": rank,
        "software": software,
        **summary,
        "tokens_per_s": round(1e3 * len(steered.plain[0].tokens) / summary["steered_ms"], 1),
    }
    if over_ours:
        beside = over_ours.summary()
        for share in ("median", "p20", "p80"):
            line[f"over_ours_{share}"] = beside[f"ratio_{share}"]
    return dict.fromkeys(KEYS) | line


def skipped_line(name: str, shape: str, reason: str) -> dict[str, Any]:
    """A peer that was not measured, and why: every figure is None."""
    return dict.fromkeys(KEYS) | {"name": name, "shape": shape, "skipped": reason}
