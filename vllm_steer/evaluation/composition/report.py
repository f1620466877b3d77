"""The report of a comparison: a table for each combination, and what was chosen."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from vllm_steer.evaluation.composition.curves import raw
from vllm_steer.evaluation.composition.measurement import RowResult
from vllm_steer.evaluation.composition.selection import SelectedStrengths
from vllm_steer.evaluation.composition.spec import Combination, ComparisonSpec, label
from vllm_steer.evaluation.report import PERPLEXITY
from vllm_steer.markdown import markdown_text
from vllm_steer.steers import Steer
from vllm_steer.tables import Column, Table, figure, markdown_list

ALL: Final = "all"
BEST: Final = "best fixed"
"""The fixed strengths that are best for one seen combination alone: no unseen one can have them."""

_FIGURES: Final = {PERPLEXITY: "perplexity", "median": "median", "dist-2": "dist-2"}


@dataclass(frozen=True)
class ComparisonReport:
    """All of a comparison's figures.

    ``about`` is what the texts come from, ``absences`` names combination, method and reason of the
    rows that there are not, ``missing`` the judges that are not available.
    """

    about: Mapping[str, Any]
    asked: ComparisonSpec
    steers: Mapping[str, Steer]
    chosen: SelectedStrengths
    rows: Sequence[RowResult]
    absences: Sequence[tuple[Combination, str, str]]
    missing: Mapping[str, str]

    def of(self, combination: Combination) -> list[RowResult]:
        """The rows of a combination."""
        return [each for each in self.rows if each.row.candidate.combination == combination]

    @property
    def data(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            **self.about,
            "properties": {
                name: each.model_dump(mode="json", exclude={"steer"})
                for name, each in self.asked.properties.items()
            },
            "seen": list(map(label, self.asked.seen)),
            "unseen": list(map(label, self.asked.unseen)),
            "chosen": {method: dict(c.doses) for method, c in self.chosen.methods.items()},
            "choosing": [{**each.about, **asdict(figures)} for each, figures in self.chosen.tried],
            "not_at_hand": dict(self.missing),
            "rows": [_row_data(each) for each in self.rows],
            "absent": [
                {"combination": label(combination), "method": method, "reason": reason}
                for combination, method, reason in self.absences
            ],
        }

    @property
    def strengths(self) -> dict[str, Any]:
        """Every dynamic strength by combination and property: by prompt, text and token."""
        return {
            label(each.row.candidate.combination): raw(each.answers)
            for each in self.rows
            if each.curves
        }


def tables(report: ComparisonReport) -> Iterator[Table]:
    """What was chosen, and a table for each combination; dPPL where there is any."""
    columns = [Column("method"), *(Column(name, "g") for name in report.asked.properties)]
    yield Table("strengths", columns, list(_strengths(report)))
    for combination in report.asked.combinations:
        rows = report.of(combination)
        judged = any(not isinstance(each.dppl, str) for each in rows)
        dppl = ["dPPL", "median dPPL"] if judged else []
        seen = "seen" if combination in report.asked.seen else "unseen"
        several = [ALL] if len(combination) > 1 else []
        headings = [*several, *combination, *_FIGURES.values(), *dppl]
        yield Table(
            f"{label(combination)} ({seen})",
            [Column("method"), *(Column(heading, figure) for heading in headings)],
            [_cells(each, bool(several), judged) for each in rows],
        )


def markdown(report: ComparisonReport) -> str:
    """The same tables in Markdown, after a line on the run."""
    prompts, choosing = report.about["prompts"], report.about["choosing_prompts"]
    on = "the same ones"
    if choosing:
        on = f"{choosing['count']} others of {markdown_text(choosing['file'])}"
    title = f"{', '.join(report.asked.properties)} on {report.about['model']}"
    lines = [
        f"# {markdown_text(title)}",
        "",
        f"{prompts['count']} prompts of {markdown_text(prompts['file'])}, "
        f"{report.about['sampling']['samples']} texts each; strengths and options are chosen on "
        f"{on}, on the seen combinations.",
    ]
    for table in tables(report):
        lines += table.markdown()
    if found := list(notes(report)):
        lines += ["", "## Not there", *markdown_list(found)]
    return "\n".join(lines) + "\n"


def notes(report: ComparisonReport) -> Iterator[str]:
    """What is not there, and why: rows, dPPL, judges."""
    lacking: dict[tuple[str, str], list[str]] = {}
    for combination, method, reason in report.absences:
        lacking.setdefault((method, reason), []).append(label(combination))
    for each in report.rows:
        if isinstance(each.dppl, str):
            names = lacking.setdefault(("dPPL", each.dppl), [])
            if (name := label(each.row.candidate.combination)) not in names:
                names.append(name)
    for (what, reason), names in lacking.items():
        yield f"{what} of {', '.join(names)}: {reason}"
    for name, reason in report.missing.items():
        yield f"{name}: {reason}"


def _strengths(report: ComparisonReport) -> Iterator[list[str]]:
    """What each method gives to each property, and the best fixed strengths where they differ."""
    names = list(report.asked.properties)
    for method, choice in report.chosen.methods.items():
        yield [method, *(_said(choice.doses.get(name)) for name in names)]
    for combination, choice in report.chosen.best.items():
        own = choice.of(combination)
        if own != report.chosen.methods["fixed"].of(combination):
            yield [f"{BEST}: {label(combination)}", *(_said(own.get(name)) for name in names)]


def _cells(each: RowResult, several: bool, judged: bool) -> list[str | float]:
    dppl = {} if isinstance(each.dppl, str) else each.dppl
    return [
        each.row.title,
        *([each.accuracy] if several else []),
        *each.shares.values(),
        *(_first(each, name) for name in _FIGURES),
        *([dppl.get(name, math.nan) for name in ("mean", "median")] if judged else []),
    ]


def _first(each: RowResult, name: str) -> float:
    """A figure by the first judge that has it."""
    return next((f[name] for f in each.judges.values() if name in f), math.nan)


def _said(dose: Mapping[str, Any] | None) -> str:
    if dose is None:
        return "-"
    if dose["strength"] != "dynamic":
        return f"{dose['strength']:g}"
    divided = " / |Q|" if dose["kl"] == "authors" else ""
    return f"to {dose['max']:g}, top-p {dose['top_p']:g}{divided}"


def _row_data(each: RowResult) -> dict[str, Any]:
    return {
        "combination": label(each.row.candidate.combination),
        "seen": each.row.seen,
        "method": each.row.title,
        "steer": dict(each.row.candidate.steer),
        "all": each.accuracy,
        "share": dict(each.shares),
        "figures": {name: dict(figures) for name, figures in each.judges.items()},
        "dppl": {"reason": each.dppl} if isinstance(each.dppl, str) else dict(each.dppl),
        "strength_over_tokens": {name: asdict(curve) for name, curve in each.curves.items()},
    }
