"""Runs an evaluation: generate, judge, report; each part resumes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from vllm_steer.errors import SteerError
from vllm_steer.evaluation.answers import Judge
from vllm_steer.evaluation.control import random_steer
from vllm_steer.evaluation.generating import EngineOptions
from vllm_steer.evaluation.json_files import write_json
from vllm_steer.evaluation.prompts import Prompts
from vllm_steer.evaluation.report import JudgeEntry, Report, make_report, markdown
from vllm_steer.evaluation.run import Run, Setting, open_run, settings_of
from vllm_steer.evaluation.sampling import Sampling
from vllm_steer.evaluation.scoring import score
from vllm_steer.evaluation.writing import Progress, Texts, write_missing
from vllm_steer.files import load_steer, save_steer
from vllm_steer.files.atomic_write import write_text
from vllm_steer.request import read_dose
from vllm_steer.run_folder import locked
from vllm_steer.steers import DeltaSteer, Steer
from vllm_steer.steers.content import content_digest

MakeJudges = Callable[[Sequence[str]], tuple[list[Judge], dict[str, str]]]

DEFAULT_JUDGES: Final = ("diversity", "repetition")
_VERSIONS: Final = ("torch", "vllm")


@dataclass(frozen=True)
class Evaluation:
    """What is asked: a model, a steer's file, prompts, strengths, judges, and how to sample.

    ``judges`` are specifications, see ``make_judges``; none given means perplexity by the model
    itself, diversity and repetition. ``options`` are the steer's options as in a request
    (``layers``, ``phase``, ``schedule``). ``control_seed`` is the random control's.
    """

    model: str
    steer: Path
    prompts: Prompts
    strengths: tuple[float, ...]
    folder: Path
    judges: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    options: Mapping[str, Any] = field(default_factory=dict)
    control_seed: int = 0
    engine: EngineOptions = field(default_factory=EngineOptions)
    restart: bool = False

    @property
    def specs(self) -> tuple[str, ...]:
        """The judges asked for, or the default ones."""
        return self.judges or (f"perplexity:{self.model}", *DEFAULT_JUDGES)


def evaluate(asked: Evaluation, make_judges: MakeJudges, progress: Progress) -> Report:
    """Run an evaluation, or the rest of it, and write its report into the run's folder.

    Texts are generated setting by setting in vLLM; a setting that is finished in the folder is not
    generated again. Judges come after the engine is gone, for they may need its memory; their
    figures are always taken anew.

    Raises ``SteerError`` for a steer or a judge that cannot be, a folder of another run, no judge
    available, a folder that another process is using, and a file that cannot be written: what was
    written before stays.
    """
    steer = load_steer(asked.steer)
    read_dose("steer", {"strength": 1.0, **asked.options}, steer)
    judges, missing = make_judges(asked.specs)
    if not judges:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
        raise SteerError(f"no judge is available ({reasons})")
    about = about_run(asked, steer)
    with locked(asked.folder):
        return _evaluate(asked, steer, about, judges, missing, progress)


def _evaluate(
    asked: Evaluation,
    steer: Steer,
    about: Mapping[str, Any],
    judges: Sequence[Judge],
    missing: Mapping[str, str],
    progress: Progress,
) -> Report:
    run = open_run(asked.folder, about, restart=asked.restart)
    settings = settings_of(asked.strengths)
    _generate(run, settings, asked, steer, progress)
    with progress("judging", len(settings) * len(judges)) as advance:
        scores = score(run, settings, judges, on_setting=lambda n, who: advance(n, said=who))
    entries = [JudgeEntry(judge.name, judge.effect) for judge in judges]
    report = make_report(about, settings, entries, scores, missing)
    write_json(run.folder / "report.json", report.data)
    write_text(run.folder / "report.md", markdown(report))
    return report


def about_run(asked: Evaluation, steer: Steer) -> dict[str, Any]:
    """All that decides the texts of a setting, in plain data; strengths and judges may be added."""
    from vllm_steer.version import __version__

    # The digest leaves the schedule out: a request chooses it, and this one takes the file's.
    schedule = {"schedule": steer.schedule} if isinstance(steer, DeltaSteer) else {}
    return {
        "model": asked.model,
        "steer": {
            "file": asked.steer.name,
            "kind": steer.kind,
            "sha256": content_digest(steer),
            **schedule,
            **asked.options,
        },
        "control_seed": asked.control_seed,
        "prompts": asked.prompts.settings,
        "sampling": asked.sampling.settings,
        "engine": asked.engine.decisive,
        "versions": {"vllm-steer": __version__, **{name: version(name) for name in _VERSIONS}},
    }


def _generate(
    run: Run, settings: Sequence[Setting], asked: Evaluation, steer: Steer, progress: Progress
) -> None:
    if not run.missing(settings):
        return
    save_steer(random_steer(steer, asked.control_seed), run.control)
    files = {"steer": asked.steer.resolve(), "random": run.control.resolve()}
    wanted = [
        Texts(setting, asked.prompts.texts, asked.sampling, _request(setting, asked))
        for setting in settings
    ]
    write_missing(run, wanted, asked.model, files, asked.engine, progress)


def _request(setting: Setting, asked: Evaluation) -> dict[str, Any] | None:
    if setting.which == "none":
        return None
    return {setting.which: {"strength": setting.strength, **asked.options}}
