"""The figures of one row of a comparison: a combination under a method."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from vllm_steer.evaluation.answers import Answers, Judge, OnText, ignore_count, num_texts
from vllm_steer.evaluation.composition import dppl
from vllm_steer.evaluation.composition.candidates import Candidate
from vllm_steer.evaluation.composition.curves import Curve, dynamic_curves
from vllm_steer.evaluation.composition.dppl import GoldAnswer, PromptPair
from vllm_steer.evaluation.composition.property_judges import (
    PropertyJudges,
    ShareWithError,
    share_with_error,
)
from vllm_steer.evaluation.composition.spec import Combination
from vllm_steer.evaluation.run import Run
from vllm_steer.evaluation.scores import figures_with_errors
from vllm_steer.models import LanguageModel
from vllm_steer.steers import Steer

NO_EXAMPLES = "no prompts with demonstrations were given (examples)"


@dataclass(frozen=True)
class ComparisonRow:
    """A combination with a method; ``title`` is the method's name in the report."""

    title: str
    candidate: Candidate
    seen: bool


@dataclass(frozen=True)
class RowResult:
    """The figures of a row.

    ``accuracy`` is the share of texts with all the properties at once, ``shares`` the share of each
    property, ``judges`` the figures of the other judges, all with standard errors. ``dppl`` has the
    dPPL figures, or the reason why there are none. ``curves`` are the dynamic strengths over
    tokens.
    """

    row: ComparisonRow
    accuracy: ShareWithError
    shares: Mapping[str, ShareWithError]
    judges: Mapping[str, Mapping[str, float]]
    dppl: Mapping[str, Any] | str
    curves: Mapping[str, Curve]
    answers: Sequence[Answers]


@dataclass(frozen=True)
class DpplReferences:
    """Inputs of dPPL: the model, the prompt pairs, the gold answers and whether they have the
    properties.
    """

    language: LanguageModel
    examples: Sequence[PromptPair]
    golds: Sequence[GoldAnswer]
    has_properties: Sequence[bool]


def measure(
    row: ComparisonRow,
    run: Run,
    properties: PropertyJudges,
    judges: Sequence[Judge],
    references: DpplReferences | None,
    steers: Mapping[str, Steer],
    on_text: OnText = ignore_count,
) -> RowResult:
    """The figures of a row whose texts have been generated.

    ``on_text`` receives the number of texts scored so far, over all ``judges``.
    """
    candidate = row.candidate
    answers = run.read(candidate)
    names = candidate.combination
    figures: dict[str, Mapping[str, float]] = {}
    for judge in judges:
        offset = len(figures) * num_texts(answers)
        figures[judge.name] = figures_with_errors(judge, answers, partial(_add, on_text, offset))
    return RowResult(
        row,
        share_with_error(properties.has_all(names, candidate.name, answers)),
        {name: share_with_error(properties.has(name, candidate.name, answers)) for name in names},
        figures,
        NO_EXAMPLES if references is None else _dppl(candidate, run, references, steers),
        dynamic_curves(answers),
        answers,
    )


def _add(on_text: OnText, offset: int, count: int) -> None:
    on_text(offset + count)


def read_references(
    language: LanguageModel,
    examples: Mapping[Combination, Sequence[PromptPair]],
    properties: PropertyJudges,
    max_tokens: int,
) -> dict[Combination, DpplReferences]:
    """The gold answers of each combination's prompt pairs, and whether they have the properties."""
    references = {}
    for combination, rows in examples.items():
        golds = [dppl.gold_answer(language, row, max_tokens) for row in rows]
        answers = [Answers(row.plain, (gold.text,)) for row, gold in zip(rows, golds, strict=True)]
        verdicts = properties.has_all(combination, f"examples.{'+'.join(combination)}", answers)
        references[combination] = DpplReferences(
            language, rows, golds, [row[0] for row in verdicts]
        )
    return references


def examples_candidate(candidate: Candidate) -> Candidate:
    """The free generation that yields the dynamic strengths for dPPL."""
    return Candidate("examples", candidate.combination, candidate.method, candidate.steer)


def _dppl(
    candidate: Candidate, run: Run, references: DpplReferences, steers: Mapping[str, Steer]
) -> dict[str, Any]:
    strengths: list[Any] = [None] * len(references.examples)
    if candidate.method == "dynamic":
        strengths = [answer.strengths[0] for answer in run.read(examples_candidate(candidate))]
    steered = [
        dppl.steered_perplexity(
            references.language, example, gold, candidate.steer, steers, dynamic
        )
        for example, gold, dynamic in zip(
            references.examples, references.golds, strengths, strict=True
        )
    ]
    return dppl.figures(steered, references.golds, references.has_properties)
