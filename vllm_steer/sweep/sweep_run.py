"""Runs a sweep in one engine and writes its result into the steer file."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_steer.errors import SteerError
from vllm_steer.evaluation.answers import Answers, Judge, OnText
from vllm_steer.evaluation.dose_options import check_dose, conditions_metadata, load_conditions
from vllm_steer.evaluation.generation import Engine, EngineOptions, engine
from vllm_steer.evaluation.prompts import Prompts
from vllm_steer.evaluation.report import PERPLEXITY
from vllm_steer.evaluation.sampling import Sampling
from vllm_steer.evaluation.scores import figures_of
from vllm_steer.evaluation.timings import Timings
from vllm_steer.files import load_steer, save_steer
from vllm_steer.files.safetensors_file import is_safetensors, read_header
from vllm_steer.files.steer_file import FORMAT
from vllm_steer.steers import ConditionSteer, LMSteer, Steer
from vllm_steer.steers.layers import format_layers
from vllm_steer.sweep.candidates import CandidateLayers, parse_candidates
from vllm_steer.sweep.search import Direction, Point, bisection, choose, grid

MakeJudge = Callable[[str], Judge]
OnPoint = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Search:
    """A grid of ``strengths``, or, if they are None, ``rounds`` bisections between two ``ends``."""

    strengths: tuple[float, ...] | None = None
    ends: tuple[float, float] = (0.0, 10.0)
    rounds: int = 6

    def points(self, candidates: int) -> int:
        """The maximum number of points."""
        if self.strengths is None:
            return candidates * (self.rounds + 1)
        return candidates * sum(strength != 0 for strength in self.strengths)


@dataclass(frozen=True)
class SweepSettings:
    """What to sweep: model, steer file, prompts, judges, budget, search, sampling and engine
    options.

    ``budget`` is the maximum ratio of total perplexity to the unsteered model's. ``layers`` are
    candidates as in ``parse_candidates``. ``judge`` and ``perplexity`` are the specifications of
    the effect judge and of the perplexity judge; ``direction`` is whether the effect should rise or
    fall. ``options`` are those of a dose besides strength and layers, ``conditions`` the files of
    the conditions that its ``when`` names.

    Raises ``SteerError`` for a budget or a number of rounds out of range.
    """

    model: str
    steer: Path
    prompts: Prompts
    judge: str
    perplexity: str
    budget: float = 1.2
    search: Search = field(default_factory=Search)
    layers: str | None = None
    direction: Direction = "up"
    options: Mapping[str, Any] = field(default_factory=dict)
    conditions: Mapping[str, Path] = field(default_factory=dict)
    sampling: Sampling = field(default_factory=Sampling)
    engine: EngineOptions = field(default_factory=EngineOptions)

    def __post_init__(self) -> None:
        if not 1 < self.budget < float("inf"):
            raise SteerError(
                f"budget is {self.budget}; expected a ratio of perplexities above 1, such as 1.2"
            )
        if self.search.rounds < 1:
            raise SteerError(f"rounds is {self.search.rounds}; expected at least 1")


@dataclass(frozen=True)
class SweepResult:
    """All points of a sweep, the unsteered model's figures, and the number of texts per point.

    ``timings`` is not part of the sweep's JSON.
    """

    settings: SweepSettings
    unsteered: Point
    points: tuple[Point, ...]
    texts: int
    loaded_conditions: Mapping[str, ConditionSteer] = field(default_factory=dict, compare=False)
    timings: Timings = field(default_factory=Timings, compare=False)

    def choose(self) -> Point:
        """The selected point, see ``search.choose``. Raises ``SteerError`` if there is none."""
        return choose(
            self.points,
            self.unsteered.effect,
            budget=self.settings.budget,
            direction=self.settings.direction,
            texts=self.texts,
        )

    @property
    def metadata(self) -> dict[str, Any]:
        """What determines the points, as plain data."""
        return {
            "model": self.settings.model,
            "prompts": self.settings.prompts.settings,
            "judge": self.settings.judge,
            "perplexity": self.settings.perplexity,
            "budget": self.settings.budget,
            "direction": self.settings.direction,
            **({"options": dict(self.settings.options)} if self.settings.options else {}),
            **conditions_metadata(self.loaded_conditions, self.settings.conditions),
            "sampling": self.settings.sampling.settings,
        }


def sweep(
    settings: SweepSettings, make_judge: MakeJudge, on_point: OnPoint = lambda *_: None
) -> SweepResult:
    """Measure the unsteered model and all points of a search, in one engine.

    ``make_judge`` maps a judge specification to a judge. ``on_point`` receives the number of points
    measured, their maximum number, and a description of the next point. Raises ``SteerError`` for
    an invalid steer, judge or set of layers.
    """
    steer = load_steer(settings.steer)
    conditions = load_conditions(settings.conditions, taken=("steer",))
    candidates = parse_candidates(settings.layers, steer)
    for candidate in candidates:
        check_dose("steer", _dose(settings, steer, candidate, 1.0), steer, conditions)
    effect_judge = _effect_judge(make_judge(settings.judge))
    judges = (effect_judge, make_judge(settings.perplexity))
    total = 1 + settings.search.points(len(candidates))
    texts = len(settings.prompts.texts) * settings.sampling.samples
    timings = Timings()
    options = replace(settings.engine, beside_judges=True)
    files = {"steer": settings.steer, **settings.conditions}
    files = {name: path.resolve() for name, path in files.items()}
    with engine(settings.model, files, options) as llm_engine:
        points: list[Point] = []
        unsteered: Point | None = None

        def measure(candidate: CandidateLayers, strength: float) -> Point:
            done = len(points) + (unsteered is not None)
            name = f"{candidate.name} at {strength:g}" if done else "the unsteered model"
            on_point(done, total, name)
            started = time.monotonic()
            answers = _answers(llm_engine, settings, steer, candidate, strength)
            timings.generated(answers, time.monotonic() - started)

            def on_text(count: int) -> None:
                on_point(done, total, f"{name}: {count} of {texts} texts judged")

            with timings.judging():
                return _point(candidate, strength, answers, judges, unsteered, on_text)

        unsteered = measure(CandidateLayers("none", None), 0.0)
        for point in _search(settings, measure, candidates):
            points.append(point)
    return SweepResult(settings, unsteered, tuple(points), texts, conditions, timings)


def check_writable(path: Path) -> None:
    """Raise ``SteerError`` unless a file is a vllm-steer file, the only format with a default
    strength.
    """
    if not path.is_file():
        raise SteerError(f"{path}: no such file; give the path of a steer file")
    is_own_format = is_safetensors(path) and read_header(path)[0].get("format") == FORMAT
    if not is_own_format:
        raise SteerError(
            f"{path}: this is not a vllm-steer file, and only one can hold a default strength; "
            "convert it with vllm-steer convert"
        )


def write_choice(result: SweepResult, best: Point) -> Steer:
    """Write the selected strength, and the selected layers if candidates were given, into the steer
    file.

    The file is replaced atomically; its recipe is kept and extended by the result of the sweep.
    Layers that were not selected are removed.
    """
    steer = load_steer(result.settings.steer)
    assert not isinstance(steer, ConditionSteer)
    if result.settings.layers is not None and best.candidate.layers is not None:
        assert not isinstance(steer, LMSteer)
        steer = steer.keep_layers(best.candidate.layers)
    record = {
        "settings": result.metadata,
        "unsteered": result.unsteered.data,
        "chosen": best.data,
    }
    recipe = {**(steer.recipe or {}), "sweep": record}
    written = replace(steer, default_strength=best.strength, recipe=recipe)
    save_steer(written, result.settings.steer)
    return written


def _search(
    settings: SweepSettings,
    measure: Callable[[CandidateLayers, float], Point],
    candidates: Sequence[CandidateLayers],
) -> Iterator[Point]:
    search = settings.search
    if search.strengths is not None:
        return grid(measure, candidates, search.strengths)
    return bisection(measure, candidates, search.ends, rounds=search.rounds, budget=settings.budget)


def _answers(
    llm_engine: Engine,
    settings: SweepSettings,
    steer: Steer,
    candidate: CandidateLayers,
    strength: float,
) -> list[Answers]:
    if strength == 0:
        return llm_engine.generate(settings.prompts.texts, settings.sampling)
    dose = _dose(settings, steer, candidate, strength)
    return llm_engine.generate(settings.prompts.texts, settings.sampling, {"steer": dose})


def _dose(
    settings: SweepSettings, steer: Steer, candidate: CandidateLayers, strength: float
) -> dict[str, Any]:
    """The dose of a request in the layers of a candidate."""
    dose: dict[str, Any] = {"strength": strength, **settings.options}
    if candidate.layers is not None and candidate.layers != steer.layers:
        dose["layers"] = format_layers(candidate.layers)
    return dose


def _point(
    candidate: CandidateLayers,
    strength: float,
    answers: Sequence[Answers],
    judges: tuple[Judge, Judge],
    unsteered: Point | None,
    on_text: OnText,
) -> Point:
    effect_judge, perplexity_judge = judges
    assert effect_judge.effect is not None
    effect = figures_of(effect_judge, answers, on_text)[effect_judge.effect]
    perplexity = _perplexity(figures_of(perplexity_judge, answers, on_text), perplexity_judge.name)
    base = perplexity if unsteered is None else unsteered.perplexity
    return Point(candidate, strength, effect, perplexity, perplexity / base)


def _perplexity(scores: Mapping[str, float], name: str) -> float:
    if PERPLEXITY not in scores:
        raise SteerError(f"judge {name} has no perplexity; give perplexity:MODEL")
    return scores[PERPLEXITY]


def _effect_judge(judge: Judge) -> Judge:
    if judge.effect is None:
        raise SteerError(
            f"judge {judge.name} measures no effect; a sweep needs one such as lexicon:FILE, "
            "classifier:MODEL:LABEL or language:CODE"
        )
    return judge
