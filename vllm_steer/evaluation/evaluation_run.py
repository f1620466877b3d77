"""Runs an evaluation: generate, judge, report. Every stage can be resumed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from vllm_steer.errors import SteerError
from vllm_steer.evaluation.answers import Judge
from vllm_steer.evaluation.control import random_steer
from vllm_steer.evaluation.dose_options import check_dose, conditions_metadata, load_conditions
from vllm_steer.evaluation.generation import EngineOptions
from vllm_steer.evaluation.json_files import write_json
from vllm_steer.evaluation.missing_texts import (
    GenerationTask,
    Progress,
    no_progress,
    write_missing,
)
from vllm_steer.evaluation.prompts import Prompts
from vllm_steer.evaluation.report import EvaluationReport, JudgeEntry, make_report, markdown
from vllm_steer.evaluation.run import Condition, Run, condition_grid, open_run
from vllm_steer.evaluation.sampling import Sampling
from vllm_steer.evaluation.scores import score
from vllm_steer.evaluation.timings import Timings
from vllm_steer.files import load_steer, save_steer
from vllm_steer.files.atomic_write import write_text
from vllm_steer.run_folder import locked
from vllm_steer.steers import ConditionSteer, DeltaSteer, Steer
from vllm_steer.steers.content import content_digest

MakeJudges = Callable[[Sequence[str]], tuple[list[Judge], dict[str, str]]]

DEFAULT_JUDGES: Final = ("diversity", "repetition")
_VERSIONS: Final = ("torch", "vllm")


@dataclass(frozen=True)
class EvaluationSettings:
    """What to evaluate: model, steer file, prompts, strengths, judges, sampling and engine options.

    ``judges`` are judge specifications, see ``make_judges``; empty selects perplexity by the model
    itself, diversity and repetition. ``options`` are the options of a dose (``layers``, ``phase``,
    ``schedule``, ``low``, ``high``, ``when``), ``conditions`` the files of the conditions that
    ``when`` names. ``control_seed`` seeds the random control. ``folder`` is the run folder;
    ``restart`` discards a run in it.
    """

    model: str
    steer: Path
    prompts: Prompts
    strengths: tuple[float, ...]
    folder: Path
    judges: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    options: Mapping[str, Any] = field(default_factory=dict)
    conditions: Mapping[str, Path] = field(default_factory=dict)
    control_seed: int = 0
    engine: EngineOptions = field(default_factory=EngineOptions)
    restart: bool = False

    @property
    def specs(self) -> tuple[str, ...]:
        """The judge specifications: those given, or the default ones."""
        return self.judges or (f"perplexity:{self.model}", *DEFAULT_JUDGES)


def evaluate(
    settings: EvaluationSettings, make_judges: MakeJudges, progress: Progress = no_progress
) -> EvaluationReport:
    """Run or resume an evaluation and write its report into the run folder.

    The steer, a random steer of equal norm and the unsteered model generate texts in vLLM at each
    strength; texts that the run folder already has are not generated again. Judges run after the
    engine has released its memory; their figures are always recomputed. ``make_judges`` maps judge
    specifications to judges and the reasons of unavailable ones; ``progress`` reports the stages.

    Raises ``SteerError`` for an invalid steer, dose or judge, if no judge is available, for a run
    folder with other settings or in use by another process, and for a file that cannot be written.
    Results written before the error are kept.
    """
    steer = load_steer(settings.steer)
    conditions = load_conditions(settings.conditions, taken=("steer", "random"))
    check_dose("steer", {"strength": 1.0, **settings.options}, steer, conditions)
    judges, missing = make_judges(settings.specs)
    if not judges:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
        raise SteerError(f"no judge is available ({reasons}); give another judge")
    metadata = run_metadata(settings, steer, conditions)
    with locked(settings.folder):
        return _evaluate(settings, steer, metadata, judges, missing, progress)


def _evaluate(
    settings: EvaluationSettings,
    steer: Steer,
    metadata: Mapping[str, Any],
    judges: Sequence[Judge],
    missing: Mapping[str, str],
    progress: Progress,
) -> EvaluationReport:
    run = open_run(settings.folder, metadata, restart=settings.restart)
    conditions = condition_grid(settings.strengths)
    timings = Timings()
    _generate(run, conditions, settings, steer, progress, timings)
    texts = len(settings.prompts.texts) * settings.sampling.samples
    with progress("judging", texts * len(conditions) * len(judges)) as advance, timings.judging():
        scores = score(
            run,
            conditions,
            judges,
            on_text=lambda done, judge_name: advance(done, description=judge_name),
        )
    entries = [JudgeEntry(judge.name, judge.effect) for judge in judges]
    report = make_report(metadata, conditions, entries, scores, missing, timings)
    write_json(run.folder / "report.json", report.data)
    write_text(run.folder / "report.md", markdown(report))
    return report


def run_metadata(
    settings: EvaluationSettings,
    steer: Steer,
    conditions: Mapping[str, ConditionSteer] | None = None,
) -> dict[str, Any]:
    """Everything that determines the texts of a condition, as plain data: the settings of the run.

    Strengths and judges are not part of it, so a later run may add some.
    """
    from vllm_steer.version import __version__

    # The digest excludes the schedule, which a request may override; here it affects the texts.
    schedule = {"schedule": steer.schedule} if isinstance(steer, DeltaSteer) else {}
    return {
        "model": settings.model,
        "steer": {
            "file": settings.steer.name,
            "kind": steer.kind,
            "sha256": content_digest(steer),
            **schedule,
            **settings.options,
        },
        **conditions_metadata(conditions or {}, settings.conditions),
        "control_seed": settings.control_seed,
        "prompts": settings.prompts.settings,
        "sampling": settings.sampling.settings,
        "engine": settings.engine.output_affecting,
        "versions": {"vllm-steer": __version__, **{name: version(name) for name in _VERSIONS}},
    }


def _generate(
    run: Run,
    conditions: Sequence[Condition],
    settings: EvaluationSettings,
    steer: Steer,
    progress: Progress,
    timings: Timings,
) -> None:
    if not run.missing(conditions):
        return
    save_steer(random_steer(steer, settings.control_seed), run.control)
    files = {
        "steer": settings.steer.resolve(),
        "random": run.control.resolve(),
        **{name: path.resolve() for name, path in settings.conditions.items()},
    }
    tasks = [
        GenerationTask(
            condition, settings.prompts.texts, settings.sampling, _request(condition, settings)
        )
        for condition in conditions
    ]
    write_missing(run, tasks, settings.model, files, settings.engine, progress, timings)


def _request(condition: Condition, settings: EvaluationSettings) -> dict[str, Any] | None:
    if condition.steer == "none":
        return None
    return {condition.steer: {"strength": condition.strength, **settings.options}}
