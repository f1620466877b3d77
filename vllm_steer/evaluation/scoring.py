"""What the judges say of every setting."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_steer.evaluation.answers import Judge
from vllm_steer.evaluation.run import Run, Setting
from vllm_steer.files.whole import write_text

Figures = Mapping[str, float]
Scores = Mapping[str, Mapping[str, Figures]]
"""Figures by judge's name and by setting's name."""


def score(
    run: Run,
    settings: Sequence[Setting],
    judges: Sequence[Judge],
    *,
    on_setting: Callable[[int, str], None] | None = None,
) -> Scores:
    """Every judge's figures of every setting; kept in the run's ``scores.json`` judge by judge.

    ``on_setting`` is called with the settings scored so far, over all judges, and the judge.
    """
    scores: dict[str, dict[str, Figures]] = {}
    done = 0
    for judge in judges:
        scores[judge.name] = {}
        for setting in settings:
            scores[judge.name][setting.name] = dict(judge.scores(run.read(setting)))
            done += 1
            if on_setting is not None:
                on_setting(done, judge.name)
        write_json(run.folder / "scores.json", scores)
    return scores


def write_json(path: Path, value: Any) -> None:
    """Write plain data whole, with null where a number is not finite: JSON has no NaN."""
    write_text(path, as_json(value) + "\n")


def as_json(value: Any) -> str:
    """Plain data as JSON of two spaces' indent, with null where a number is not finite."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
