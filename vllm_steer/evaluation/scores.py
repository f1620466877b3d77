"""Scores of all conditions by all judges."""

from collections.abc import Callable, Mapping, Sequence

from vllm_steer.evaluation.answers import (
    Answers,
    Judge,
    OnText,
    TextJudge,
    ignore_count,
    num_texts,
)
from vllm_steer.evaluation.json_files import write_json
from vllm_steer.evaluation.run import Condition, Run
from vllm_steer.evaluation.standard_errors import with_errors

Figures = Mapping[str, float]
Scores = Mapping[str, Mapping[str, Figures]]
"""Figures by judge and condition."""


def score(
    run: Run,
    conditions: Sequence[Condition],
    judges: Sequence[Judge],
    *,
    on_text: Callable[[int, str], object] | None = None,
) -> Scores:
    """Score every condition with every judge; ``scores.json`` is updated after each judge.

    ``on_text`` receives the number of texts scored so far, over all judges, and the judge's name.
    """
    scores: dict[str, dict[str, Figures]] = {}
    done = 0
    for judge in judges:
        scores[judge.name] = {}
        for condition in conditions:
            answers = run.read(condition)
            count = _counted_from(done, judge.name, on_text)
            count(0)
            scores[judge.name][condition.name] = figures_with_errors(judge, answers, count)
            count(num_texts(answers))
            done += num_texts(answers)
        write_json(run.folder / "scores.json", scores)
    return scores


def _counted_from(done: int, name: str, on_text: Callable[[int, str], object] | None) -> OnText:
    """An ``OnText`` that adds the texts of earlier judges and conditions, and a judge's name."""
    return ignore_count if on_text is None else lambda count: on_text(done + count, name)


def figures_of(judge: Judge, answers: Sequence[Answers], on_text: OnText = ignore_count) -> Figures:
    """A judge's figures; ``on_text`` is called by a ``TextJudge`` alone."""
    if isinstance(judge, TextJudge):
        return judge.figures(judge.observe(answers, on_text))
    return judge.scores(answers)


def figures_with_errors(
    judge: Judge, answers: Sequence[Answers], on_text: OnText = ignore_count
) -> dict[str, float]:
    """A judge's figures, with standard errors if it is a ``TextJudge``."""
    if isinstance(judge, TextJudge):
        return with_errors(judge.figures, judge.observe(answers, on_text))
    return dict(judge.scores(answers))
