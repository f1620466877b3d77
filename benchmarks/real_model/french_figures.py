"""The settings of the French experiment, and what is computed from its measurements."""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.real_model.experiment import jackknife
from vllm_steer.evaluation.means import mean

Doses = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One setting of the strength: a row of the result and a set of texts."""

    method: str
    title: str
    steer: Doses
    greedy: bool = False

    @property
    def name(self) -> str:
        """The name of its texts in the run folder."""
        words = f"{'greedy' if self.greedy else 'sampled'} {self.method} {self.title}"
        return words.replace(" ", "_").replace("|", "").replace("/", "-")

    @property
    def metadata(self) -> dict[str, Any]:
        """What stands in each row of its texts."""
        return {"steer": self.steer}


def settings() -> list[Setting]:
    """All rows: no steer, the schedules, dynamic strengths, and a random delta of equal norm."""
    rows = [Setting("none", "-", {})]
    for schedule, strengths in (
        ("fixed", (0.5, 0.75, 1.0, 1.5, 2.0)),
        ("start", (1.0, 2.0)),
        ("dim", (1.0, 2.0, 3.0)),
    ):
        rows += [
            Setting(schedule, f"{strength:g}", {"fr": {"strength": strength, "schedule": schedule}})
            for strength in strengths
        ]
    for maximum, top_p in ((1.0, 0.5), (1.5, 0.5), (2.0, 0.5), (2.0, 0.7), (2.0, 0.9)):
        dose = {"strength": "dynamic", "max": maximum, "top_p": top_p}
        rows.append(Setting("dynamic", f"to {maximum:g}, top-p {top_p:g}", {"fr": dose}))
    authors = {"strength": "dynamic", "max": 2.0, "top_p": 0.5, "kl": "authors"}
    rows.append(Setting("dynamic / Q", "to 2, top-p 0.5", {"fr": authors}))
    rows.append(Setting("random", "fixed 1.5", {"random": {"strength": 1.5, "schedule": "fixed"}}))
    dose = {"strength": "dynamic", "max": 2.0, "top_p": 0.5}
    rows.append(Setting("random", "dynamic to 2, top-p 0.5", {"random": dose}))
    return rows


@dataclass(frozen=True)
class Observation:
    """What was measured of one question under one setting.

    ``share`` is that of French texts, ``probability`` langdetect's, ``nll`` and ``tokens`` are
    their cost by the unsteered model, ``dist_2`` is their variety, ``greedy_share`` the verdict of
    the greedy text. ``dppl`` is the difference of perplexities of the demonstrations' answer and
    ``log_ratio`` the logarithm of their ratio, both None if that answer is not French.
    """

    share: float
    probability: float
    nll: float
    tokens: int
    dist_2: float
    greedy_share: float
    dppl: float | None
    log_ratio: float | None = None


def share(rows: Sequence[Observation]) -> float:
    """Mean share of French texts."""
    return statistics.fmean(row.share for row in rows)


def perplexity(rows: Sequence[Observation]) -> float:
    """``exp(sum nll / sum tokens)`` over all texts."""

    return math.exp(sum(row.nll for row in rows) / sum(row.tokens for row in rows))


def mean_dppl(rows: Sequence[Observation]) -> float:
    """Mean dPPL over the questions whose answer after demonstrations is French."""
    return mean(row.dppl for row in rows if row.dppl is not None)


def mean_log_ratio(rows: Sequence[Observation]) -> float:
    """Mean of ``ln(PPL_steered / PPL_icl)`` over the same questions; no single one dominates it."""
    return mean(row.log_ratio for row in rows if row.log_ratio is not None)


def figures(setting: Setting, rows: Sequence[Observation]) -> dict[str, Any]:
    """A line of the result."""
    line: dict[str, Any] = {"method": setting.method, "strength": setting.title}
    for name, statistic in (
        ("share", share),
        ("probability", lambda rows: statistics.fmean(row.probability for row in rows)),
        ("greedy_share", lambda rows: statistics.fmean(row.greedy_share for row in rows)),
        ("perplexity", perplexity),
        ("dist_2", lambda rows: statistics.fmean(row.dist_2 for row in rows)),
        ("dppl", mean_dppl),
        ("log_ratio", mean_log_ratio),
    ):
        value, error = jackknife(rows, statistic)
        line |= {name: round(value, 4), f"{name}_error": round(error, 4)}
    known = [row.dppl for row in rows if row.dppl is not None]
    line["median_dppl"] = round(statistics.median(known), 4) if known else math.nan
    return line


def saved(observations: dict[str, list[Observation]]) -> Any:
    """What each dynamic and scheduled setting saves beside fixed strengths of equal share, of dPPL
    and of the logarithm of the ratio of perplexities.

    The price of fixed strengths at a share is interpolated linearly between the two fixed settings
    around it. A setting whose share, with or without any single question, is outside of theirs has
    no line.
    """
    rows = settings()
    fixed = [row for row in rows if row.method in ("none", "fixed")]
    for setting in rows:
        if setting.method not in ("dim", "dynamic", "dynamic / Q"):
            continue
        together = list(
            zip(observations[setting.name], *(observations[row.name] for row in fixed), strict=True)
        )

        line: dict[str, Any] = {"method": setting.method, "strength": setting.title}
        for name, price in (("dppl", mean_dppl), ("log_ratio", mean_log_ratio)):
            value, error = jackknife(together, partial(_saved, price))
            line |= {name: round(value, 4), f"{name}_error": round(error, 4)}
        if not any(math.isnan(line[name]) for name in ("dppl", "dppl_error")):
            yield line


def _saved(
    price: Callable[[Sequence[Observation]], float], questions: Sequence[tuple[Observation, ...]]
) -> float:
    own, *others = zip(*questions, strict=True)
    points = [(share(other), price(other)) for other in others]
    return interpolated(points, share(own)) - price(own)


def interpolated(points: Sequence[tuple[float, float]], x: float) -> float:
    """Linear interpolation between the first neighbours that have ``x`` between them; else NaN."""
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if min(x0, x1) <= x <= max(x0, x1) and x0 != x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return float("nan")
