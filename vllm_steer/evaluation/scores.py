"""Scores of all conditions by all judges."""

from collections.abc import Callable, Mapping, Sequence

from vllm_steer.evaluation.answers import Judge
from vllm_steer.evaluation.json_files import write_json
from vllm_steer.evaluation.run import Condition, Run

Figures = Mapping[str, float]
Scores = Mapping[str, Mapping[str, Figures]]
"""Figures by judge and condition."""


def score(
    run: Run,
    conditions: Sequence[Condition],
    judges: Sequence[Judge],
    *,
    on_condition: Callable[[int, str], None] | None = None,
) -> Scores:
    """Score every condition with every judge; ``scores.json`` is updated after each judge.

    ``on_condition`` receives the number of conditions scored so far, over all judges, and the
    judge's name.
    """
    scores: dict[str, dict[str, Figures]] = {}
    done = 0
    for judge in judges:
        scores[judge.name] = {}
        for condition in conditions:
            scores[judge.name][condition.name] = dict(judge.scores(run.read(condition)))
            done += 1
            if on_condition is not None:
                on_condition(done, judge.name)
        write_json(run.folder / "scores.json", scores)
    return scores
