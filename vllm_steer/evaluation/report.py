"""The report of an evaluation: figures of the steer, the unsteered model and the random control."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from vllm_steer.errors import SteerError
from vllm_steer.evaluation.pnes import Pnes, perplexity_normalised_effect
from vllm_steer.evaluation.run import Condition, SteerRole
from vllm_steer.evaluation.scores import Scores
from vllm_steer.evaluation.standard_errors import ERROR
from vllm_steer.evaluation.timings import Timings
from vllm_steer.markdown import markdown_text
from vllm_steer.tables import Column, Table, figure, figure_with_error, markdown_list

PERPLEXITY: Final = "total_perplexity"
"""The perplexity figure that normalises effects; it includes outliers."""

STEERS: Final[tuple[SteerRole, ...]] = ("steer", "random")


@dataclass(frozen=True)
class JudgeEntry:
    """A judge's name, and the name of its effect figure, None for a judge without one."""

    name: str
    effect: str | None


@dataclass(frozen=True)
class EvaluationReport:
    """All figures of an evaluation.

    ``metadata`` is what determines the texts; ``scores`` has the figures by judge and condition,
    with standard errors such as ``share_error`` (see ``standard_errors``);
    ``missing`` has the reason for each unavailable judge. ``normalised`` has, by judge and steer
    (``steer``, ``random``), the perplexity-normalised effect, or the reason why there is none.
    ``timings`` is not part of ``data``.
    """

    metadata: Mapping[str, Any]
    conditions: tuple[Condition, ...]
    judges: tuple[JudgeEntry, ...]
    scores: Scores
    missing: Mapping[str, str]
    normalised: Mapping[str, Mapping[str, Pnes | str]]
    timings: Timings = field(default_factory=Timings, compare=False)

    def figure(self, judge: str, steer: SteerRole, strength: float, figure: str) -> float:
        """One figure; at strength 0 that of the unsteered model, for either steer."""
        condition = Condition("none" if strength == 0 else steer, strength)
        return self.scores[judge][condition.name].get(figure, math.nan)

    @property
    def strengths(self) -> list[float]:
        """All strengths, ascending, including 0."""
        return sorted({condition.strength for condition in self.conditions})

    def curve(self, judge: str, steer: SteerRole, figure: str) -> list[float]:
        """A figure at each of ``strengths``."""
        return [self.figure(judge, steer, strength, figure) for strength in self.strengths]

    @property
    def data(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            **self.metadata,
            "judges": [asdict(judge) for judge in self.judges],
            "not_at_hand": dict(self.missing),
            "settings": [
                {
                    "steer": condition.steer,
                    "strength": condition.strength,
                    "figures": {j.name: self.scores[j.name][condition.name] for j in self.judges},
                }
                for condition in self.conditions
            ],
            "normalised_effect": {
                judge: {steer: _pnes_data(fit) for steer, fit in by_steer.items()}
                for judge, by_steer in self.normalised.items()
            },
        }


def make_report(
    metadata: Mapping[str, Any],
    conditions: Sequence[Condition],
    judges: Sequence[JudgeEntry],
    scores: Scores,
    missing: Mapping[str, str],
    timings: Timings | None = None,
) -> EvaluationReport:
    """The report, with effects normalised by the perplexity of the first judge that measures it."""
    unnormalised = EvaluationReport(
        metadata, tuple(conditions), tuple(judges), scores, missing, {}, timings or Timings()
    )
    perplexity = perplexity_judge(unnormalised)
    if perplexity is None:
        return unnormalised
    normalised: dict[str, dict[str, Pnes | str]] = {
        judge.name: {
            steer: _normalised(
                unnormalised.strengths,
                unnormalised.curve(judge.name, steer, judge.effect),
                unnormalised.curve(perplexity, steer, PERPLEXITY),
            )
            for steer in STEERS
        }
        for judge in judges
        if judge.effect is not None
    }
    return replace(unnormalised, normalised=normalised)


def perplexity_judge(report: EvaluationReport) -> str | None:
    """The first judge that measures perplexity."""
    for judge in report.judges:
        if any(PERPLEXITY in figures for figures in report.scores[judge.name].values()):
            return judge.name
    return None


def tables(report: EvaluationReport) -> Iterator[Table]:
    """One table per judge: the figures of steer and control at each strength."""
    for judge in report.judges:
        scores = report.scores[judge.name]
        names = list(dict.fromkeys(name for figures in scores.values() for name in figures))
        names = [name for name in names if name.removesuffix(ERROR) not in {*names} - {name}]
        figures = [Column(name.replace("_", " "), figure) for name in names]
        rows = [
            (s.strength, s.steer, *(_cell(scores[s.name], name) for name in names))
            for s in sorted(report.conditions, key=lambda s: s.strength)
        ]
        yield Table(judge.name, [Column("strength", "g"), Column("steer"), *figures], rows)
    if report.normalised:
        yield _pnes_table(report)


def _cell(figures: Mapping[str, float], name: str) -> str:
    return figure_with_error(figures.get(name, math.nan), figures.get(name + ERROR, math.nan))


def _pnes_table(report: EvaluationReport) -> Table:
    figures = [Column("PNES", figure), Column("r2", figure), Column("highest at", ".3g")]
    rows = [
        (judge, steer, *_pnes_cells(pnes))
        for judge, by_steer in report.normalised.items()
        for steer, pnes in by_steer.items()
    ]
    title = "effect normalised by perplexity"
    return Table(title, [Column("judge"), Column("steer"), *figures], rows)


def markdown(report: EvaluationReport) -> str:
    """The report in Markdown: a description of the run and the tables."""
    prompts = report.metadata["prompts"]
    title = f"{report.metadata['steer']['file']} on {report.metadata['model']}"
    lines = [
        f"# {markdown_text(title)}",
        "",
        f"{prompts['count']} prompts of {markdown_text(prompts['file'])}, "
        f"{report.metadata['sampling']['samples']} texts each. Strength 0 is the unsteered model; "
        "*random* is a random steer of equal norm.",
    ]
    for table in tables(report):
        lines += table.markdown()
    if reasons := list(without_effect(report)):
        lines += markdown_list(reasons)
    if report.missing:
        notes = (f"{name}: {reason}" for name, reason in report.missing.items())
        lines += ["", "## Judges that are not available", *markdown_list(notes)]
    return "\n".join(lines) + "\n"


def without_effect(report: EvaluationReport) -> Iterator[str]:
    """The reason for each effect without a perplexity-normalised effect."""
    for judge, by_steer in report.normalised.items():
        for steer, fit in by_steer.items():
            if isinstance(fit, str):
                yield f"{judge}, {steer}: {fit}"


def _normalised(
    strengths: Sequence[float], effects: Sequence[float], perplexities: Sequence[float]
) -> Pnes | str:
    try:
        return perplexity_normalised_effect(strengths, effects, perplexities)
    except SteerError as error:  # such as too few strengths: keep the other figures
        return str(error)


def _pnes_data(fit: Pnes | str) -> dict[str, Any]:
    return {"reason": fit} if isinstance(fit, str) else asdict(fit)


def _pnes_cells(fit: Pnes | str) -> list[float]:
    return [math.nan] * 3 if isinstance(fit, str) else [fit.pnes, fit.r2, fit.x_max]
