"""What both experiments on sentiment do: an evaluation with their judges, its figures as rows."""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

from benchmarks.real_model.experiment import parser, seconds_of, timed
from benchmarks.real_model.sentiment import (
    SentenceClassifier,
    Sentences,
    StoredPerplexity,
    fit_classifier,
    read_sst,
    sentiment_judges,
    vader,
)
from benchmarks.result import Result, console
from vllm_steer.cli.progress import progress
from vllm_steer.evaluation import (
    EngineOptions,
    EvaluationReport,
    EvaluationSettings,
    Judge,
    Pnes,
    Prompts,
    evaluate,
    read_prompts,
)
from vllm_steer.evaluation.sampling import sampling_of
from vllm_steer.models import LanguageModel, load_language_model

Row = dict[str, Any]
ENGINE: Final = EngineOptions(max_model_len=256, enforce_eager=True)
EXAMPLES: Final = slice(2, 4)
_DIGITS: Final = 4


class SentimentRun:
    """Data, judges and settings of an experiment; ``args`` are those of ``options``."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder: Path = args.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        vader()  # an error before the work, not after it
        self.sentences: Sentences = read_sst(args.data / "sst5" / "train.txt")
        self.classifier: SentenceClassifier = fit_classifier(self.sentences)
        self.sampling = sampling_of("lm-steer", {"samples": args.samples, "top_p": args.top_p})
        self.language_model: Callable[[str], LanguageModel] = cache(load_language_model)

    @property
    def prompts(self) -> Prompts:
        """The first prompts of the authors' neutral ones."""
        path = self.args.data / "prompts" / "neutral_prompts.jsonl"
        return read_prompts(path, count=self.args.prompts)

    @property
    def settings(self) -> Row:
        """The head of the result."""
        return {
            "model": Path(self.args.model).name,
            "prompts": self.args.prompts,
            "sampling": self.sampling.settings,
            "classifier": {
                "sentences": self.classifier.sentences,
                "held_out_accuracy": round(self.classifier.accuracy, _DIGITS),
            },
        }

    def make_judges(self, model: str) -> tuple[list[Judge], dict[str, str]]:
        """The judges of texts by ``model``, whose unsteered self measures perplexity."""
        perplexity = StoredPerplexity(
            "perplexity",
            lambda: self.language_model(model),
            self.folder / f"likelihoods-{Path(model).name}.json",
        )
        return sentiment_judges(self.classifier, perplexity), {}

    def evaluate(
        self, name: str, steer: Path, strengths: Sequence[float], model: str | None = None
    ) -> EvaluationReport:
        """An evaluation in the folder ``name``, with a random steer of equal norm."""
        model = model or self.args.model
        settings = EvaluationSettings(
            model=model,
            steer=steer,
            prompts=self.prompts,
            strengths=tuple(strengths),
            folder=self.folder / name,
            sampling=self.sampling,
            engine=ENGINE,
        )
        console.print(f"{name}: {steer.name} at {', '.join(f'{s:g}' for s in strengths)}")
        return evaluate(settings, lambda _: self.make_judges(model), progress)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` returned when this was first called in the folder, as plain data."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            path.write_text(json.dumps(make()), encoding="utf-8")
        return json.loads(path.read_text(encoding="utf-8"))

    def parts(self, parts: Mapping[str, Callable[[Any, Result], None]], result: Result) -> None:
        """Run parts of the experiment; ``result`` is written after each, with its seconds."""
        for name, part in parts.items():
            with timed(self.folder, name):
                part(self, result)
            result.write(seconds=seconds_of(self.folder))


def options(doc: str | None, name: str, *, samples: int = 5) -> argparse.ArgumentParser:
    """The options of an experiment on sentiment."""
    result = parser(doc, name)
    result.add_argument("--prompts", type=int, default=25, help="of the neutral ones; paper: 5000")
    result.add_argument("--samples", type=int, default=samples, help="texts per prompt; paper: 25")
    # Below 1, vLLM sorts the whole vocabulary on a CPU: a token then takes six times as long.
    result.add_argument("--top-p", type=float, default=1.0, help="beside top-k 50; paper: 0.9")
    return result


def add_rows(result: Result, report: EvaluationReport, **facts: Any) -> None:
    """A row per condition with the figures of all judges, ``facts`` first."""
    conditions = sorted(report.conditions, key=lambda c: (c.steer != "none", c.steer, c.strength))
    for condition in conditions:
        figures = {judge.name: report.scores[judge.name][condition.name] for judge in report.judges}
        judged = {name: rounded(values) for name, values in figures.items()}
        result.add({**facts, **condition.metadata, **judged})


def pnes_of(report: EvaluationReport) -> dict[str, Any]:
    """PNES by judge and steer; the reason where there is none."""
    return {
        judge: {
            steer: {"pnes": round(p.pnes, 3), "r2": round(p.r2, 3), "highest_at": round(p.x_max, 2)}
            if isinstance(p, Pnes)
            else p
            for steer, p in by_steer.items()
        }
        for judge, by_steer in report.normalised.items()
    }


def rounded(figures: Any) -> dict[str, float]:
    """Figures to four decimal places."""
    return {name: round(value, _DIGITS) for name, value in figures.items()}


def examples(folder: Path, names: Sequence[str]) -> Iterator[Row]:
    """The first text of some prompts in each of some conditions of a run."""
    for name in names:
        lines = (folder / "generations" / f"{name}.jsonl").read_text("utf-8").splitlines()
        for line in lines[EXAMPLES]:
            row = json.loads(line)
            yield {
                "condition": name,
                "prompt": row["prompt"]["text"],
                "text": row["generations"][0]["text"],
            }
