"""The report of a run: the figures of the steer, the unsteered model and the control."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from vllm_steer.errors import SteerError
from vllm_steer.evaluation.pnes import Pnes, perplexity_normalised_effect
from vllm_steer.evaluation.run import Condition, SteerRole
from vllm_steer.evaluation.scores import Scores
from vllm_steer.markdown import markdown_text
from vllm_steer.tables import Column, Table, figure, markdown_list

PERPLEXITY: Final = "total_perplexity"
"""The figure of perplexity that effects are set against: outliers are in it."""

STEERS: Final[tuple[SteerRole, ...]] = ("steer", "random")


@dataclass(frozen=True)
class JudgeEntry:
    """A judge by its name, and the name of its figure that is an effect, if it has one."""

    name: str
    effect: str | None


@dataclass(frozen=True)
class EvaluationReport:
    """All of a run's figures.

    ``about`` is what the texts come from, as the run's settings say it; ``missing`` says of judges
    that are not available why; ``normalised`` has the effect normalised by perplexity, by judge and
    by steer (``steer``, ``random``), where there is an effect and a perplexity, or why it cannot
    be had.
    """

    metadata: Mapping[str, Any]
    conditions: tuple[Condition, ...]
    judges: tuple[JudgeEntry, ...]
    scores: Scores
    missing: Mapping[str, str]
    normalised: Mapping[str, Mapping[str, Pnes | str]]

    def figure(self, judge: str, steer: SteerRole, strength: float, figure: str) -> float:
        """One figure; at strength 0 the unsteered model's, whichever steer is asked for."""
        condition = Condition("none" if strength == 0 else steer, strength)
        return self.scores[judge][condition.name].get(figure, math.nan)

    @property
    def strengths(self) -> list[float]:
        """All strengths, 0 included, ascending."""
        return sorted({condition.strength for condition in self.conditions})

    def curve(self, judge: str, steer: SteerRole, figure: str) -> list[float]:
        """A figure over the strengths."""
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
) -> EvaluationReport:
    """The report, with effects normalised by the first judge that has a perplexity."""
    unnormalised = EvaluationReport(metadata, tuple(conditions), tuple(judges), scores, missing, {})
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
    return EvaluationReport(
        metadata, unnormalised.conditions, unnormalised.judges, scores, missing, normalised
    )


def perplexity_judge(report: EvaluationReport) -> str | None:
    """The first judge whose figures have a perplexity."""
    for judge in report.judges:
        if any(PERPLEXITY in figures for figures in report.scores[judge.name].values()):
            return judge.name
    return None


def tables(report: EvaluationReport) -> Iterator[Table]:
    """A table for each judge: at each strength the control's figures beside the steer's."""
    for judge in report.judges:
        scores = report.scores[judge.name]
        names = list(dict.fromkeys(name for figures in scores.values() for name in figures))
        figures = [Column(name.replace("_", " "), figure) for name in names]
        rows = [
            (s.strength, s.steer, *(scores[s.name].get(name, math.nan) for name in names))
            for s in sorted(report.conditions, key=lambda s: s.strength)
        ]
        yield Table(judge.name, [Column("strength", "g"), Column("steer"), *figures], rows)
    if report.normalised:
        yield _pnes_table(report)


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
    """The same tables in Markdown, after a line on the run."""
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
    """For each effect that is not normalised by perplexity, why."""
    for judge, by_steer in report.normalised.items():
        for steer, fit in by_steer.items():
            if isinstance(fit, str):
                yield f"{judge}, {steer}: {fit}"


def _normalised(
    strengths: Sequence[float], effects: Sequence[float], perplexities: Sequence[float]
) -> Pnes | str:
    try:
        return perplexity_normalised_effect(strengths, effects, perplexities)
    except SteerError as error:  # too few strengths, say: no reason to lose the other figures
        return str(error)


def _pnes_data(fit: Pnes | str) -> dict[str, Any]:
    return {"reason": fit} if isinstance(fit, str) else asdict(fit)


def _pnes_cells(fit: Pnes | str) -> list[float]:
    return [math.nan] * 3 if isinstance(fit, str) else [fit.pnes, fit.r2, fit.x_max]
