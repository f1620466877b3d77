"""The report of a comparison: the selected strengths and a table for each combination."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from vllm_steer.evaluation.composition.curves import raw_strengths
from vllm_steer.evaluation.composition.measurement import RowResult
from vllm_steer.evaluation.composition.selection import SelectedStrengths
from vllm_steer.evaluation.composition.spec import Combination, ComparisonSpec, label
from vllm_steer.evaluation.report import PERPLEXITY
from vllm_steer.evaluation.standard_errors import ERROR
from vllm_steer.evaluation.timings import Timings
from vllm_steer.markdown import markdown_text
from vllm_steer.steers import Steer
from vllm_steer.tables import Column, Table, figure, figure_with_error, markdown_list

ALL: Final = "all"
BEST_FIXED: Final = "best fixed"
"""The best fixed strengths of a single seen combination; an unseen combination has none."""

_FIGURES: Final = {PERPLEXITY: "perplexity", "median": "median", "dist-2": "dist-2"}


@dataclass(frozen=True)
class ComparisonReport:
    """All figures of a comparison.

    ``metadata`` is what determines the texts, ``missing_rows`` has combination, method and reason
    of each row that the report lacks, ``missing`` the reason for each unavailable judge.
    ``timings`` is not part of ``data``.
    """

    metadata: Mapping[str, Any]
    spec: ComparisonSpec
    steers: Mapping[str, Steer]
    selected: SelectedStrengths
    rows: Sequence[RowResult]
    missing_rows: Sequence[tuple[Combination, str, str]]
    missing: Mapping[str, str]
    timings: Timings = field(default_factory=Timings, compare=False)

    def of(self, combination: Combination) -> list[RowResult]:
        """The rows of a combination."""
        return [result for result in self.rows if result.row.candidate.combination == combination]

    @property
    def data(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            **self.metadata,
            "properties": {
                name: item.model_dump(mode="json", exclude={"steer"})
                for name, item in self.spec.properties.items()
            },
            "seen": list(map(label, self.spec.seen)),
            "unseen": list(map(label, self.spec.unseen)),
            "chosen": {method: dict(c.doses) for method, c in self.selected.methods.items()},
            "choosing": [
                {**item.metadata, **asdict(figures)} for item, figures in self.selected.measurements
            ],
            "not_at_hand": dict(self.missing),
            "rows": [_row_data(item) for item in self.rows],
            "absent": [
                {"combination": label(combination), "method": method, "reason": reason}
                for combination, method, reason in self.missing_rows
            ],
        }

    @property
    def strengths(self) -> dict[str, Any]:
        """All dynamic strengths by combination, property, prompt, text and token."""
        return {
            label(result.row.candidate.combination): raw_strengths(result.answers)
            for result in self.rows
            if result.curves
        }


def tables(report: ComparisonReport) -> Iterator[Table]:
    """The selected strengths, and a table for each combination, with dPPL if there is any."""
    columns = [Column("method"), *(Column(name, "g") for name in report.spec.properties)]
    yield Table("strengths", columns, list(_strengths(report)))
    for combination in report.spec.combinations:
        rows = report.of(combination)
        judged = any(not isinstance(result.dppl, str) for result in rows)
        dppl = ["dPPL", "median dPPL"] if judged else []
        seen = "seen" if combination in report.spec.seen else "unseen"
        several = [ALL] if len(combination) > 1 else []
        headings = [*several, *combination, *_FIGURES.values(), *dppl]
        yield Table(
            f"{label(combination)} ({seen})",
            [Column("method"), *(Column(heading, figure) for heading in headings)],
            [_cells(result, bool(several), judged) for result in rows],
        )


def markdown(report: ComparisonReport) -> str:
    """The report in Markdown: a description of the run and the tables."""
    prompts, selection_prompts = report.metadata["prompts"], report.metadata["choosing_prompts"]
    selection_source = "the same ones"
    if selection_prompts:
        selection_source = (
            f"{selection_prompts['count']} others of {markdown_text(selection_prompts['file'])}"
        )
    title = f"{', '.join(report.spec.properties)} on {report.metadata['model']}"
    lines = [
        f"# {markdown_text(title)}",
        "",
        f"{prompts['count']} prompts of {markdown_text(prompts['file'])}, "
        f"{report.metadata['sampling']['samples']} texts each; strengths and options are chosen on "
        f"{selection_source}, on the seen combinations.",
    ]
    for table in tables(report):
        lines += table.markdown()
    if lines_missing := list(notes(report)):
        lines += ["", "## Missing results", *markdown_list(lines_missing)]
    return "\n".join(lines) + "\n"


def notes(report: ComparisonReport) -> Iterator[str]:
    """The missing rows, dPPL figures and judges, each with the reason."""
    subjects: dict[tuple[str, str], list[str]] = {}
    for combination, method, reason in report.missing_rows:
        subjects.setdefault((method, reason), []).append(label(combination))
    for result in report.rows:
        if isinstance(result.dppl, str):
            names = subjects.setdefault(("dPPL", result.dppl), [])
            if (name := label(result.row.candidate.combination)) not in names:
                names.append(name)
    for (subject, reason), names in subjects.items():
        yield f"{subject} of {', '.join(names)}: {reason}"
    for name, reason in report.missing.items():
        yield f"{name}: {reason}"


def _strengths(report: ComparisonReport) -> Iterator[list[str]]:
    """The dose of each method and property, and the best fixed strengths where they differ."""
    names = list(report.spec.properties)
    for method, choice in report.selected.methods.items():
        yield [method, *(_dose_text(choice.doses.get(name)) for name in names)]
    for combination, choice in report.selected.best_fixed.items():
        doses = choice.of(combination)
        if doses != report.selected.methods["fixed"].of(combination):
            yield [
                f"{BEST_FIXED}: {label(combination)}",
                *(_dose_text(doses.get(name)) for name in names),
            ]


def _cells(result: RowResult, several: bool, judged: bool) -> list[str | float]:
    dppl = {} if isinstance(result.dppl, str) else result.dppl
    return [
        result.row.title,
        *([figure_with_error(*result.accuracy)] if several else []),
        *(figure_with_error(*share) for share in result.shares.values()),
        *(
            figure_with_error(_first(result, name), _first(result, name + ERROR))
            for name in _FIGURES
        ),
        *([dppl.get(name, math.nan) for name in ("mean", "median")] if judged else []),
    ]


def _first(result: RowResult, name: str) -> float:
    """A figure of the first judge that has it; NaN if none has."""
    return next((f[name] for f in result.judges.values() if name in f), math.nan)


def _dose_text(dose: Mapping[str, Any] | None) -> str:
    if dose is None:
        return "-"
    if dose["strength"] != "dynamic":
        return f"{dose['strength']:g}"
    divided = " / |Q|" if dose["kl"] == "authors" else ""
    return f"to {dose['max']:g}, top-p {dose['top_p']:g}{divided}"


def _row_data(result: RowResult) -> dict[str, Any]:
    return {
        "combination": label(result.row.candidate.combination),
        "seen": result.row.seen,
        "method": result.row.title,
        "steer": dict(result.row.candidate.steer),
        "all": result.accuracy.share,
        "all_error": result.accuracy.error,
        "share": {name: item.share for name, item in result.shares.items()},
        "share_error": {name: item.error for name, item in result.shares.items()},
        "figures": {name: dict(figures) for name, figures in result.judges.items()},
        "dppl": {"reason": result.dppl} if isinstance(result.dppl, str) else dict(result.dppl),
        "strength_over_tokens": {name: asdict(curve) for name, curve in result.curves.items()},
    }
