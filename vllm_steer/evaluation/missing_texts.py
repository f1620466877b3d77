"""Generates the texts that a run folder does not have yet."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from vllm_steer.evaluation.generation import EngineOptions, engine
from vllm_steer.evaluation.run import Run, TextSet
from vllm_steer.evaluation.sampling import Sampling
from vllm_steer.evaluation.timings import Timings


class ProgressCallback(Protocol):
    """``advance(done)`` sets the position of a progress bar; ``description`` replaces its text."""

    def __call__(self, done: int, *, description: str | None = None) -> None: ...


Progress = Callable[[str, int | None], AbstractContextManager[ProgressCallback]]
"""``progress(description, total)`` shows a progress bar while the block runs."""


@contextmanager
def no_progress(description: str, total: int | None = None) -> Iterator[ProgressCallback]:
    """Show no progress."""

    def advance(done: int, *, description: str | None = None) -> None:
        pass

    yield advance


@dataclass(frozen=True)
class GenerationTask:
    """A text set to generate: its prompts, sampling and the ``steer`` value of its requests."""

    text_set: TextSet
    prompts: Sequence[str]
    sampling: Sampling
    steer: Mapping[str, Any] | None

    @property
    def count(self) -> int:
        """Number of texts."""
        return len(self.prompts) * self.sampling.samples


def write_missing(
    run: Run,
    tasks: Sequence[GenerationTask],
    model: str,
    steers: Mapping[str, Path],
    options: EngineOptions,
    progress: Progress,
    timings: Timings,
) -> None:
    """Generate the missing texts of a run in one engine, which is then shut down.

    ``steers`` maps the steer names in the requests to files. The texts are added to ``timings``.
    """
    task_by_name = {task.text_set.name: task for task in tasks}
    missing = run.missing([task.text_set for task in task_by_name.values()])
    if not missing:
        return
    total = sum(task.count for task in task_by_name.values())
    done = total - sum(task_by_name[text_set.name].count for text_set in missing)
    with (
        progress("starting vLLM", total) as advance,
        engine(model, steers, options) as llm_engine,
    ):
        for text_set in missing:
            task = task_by_name[text_set.name]
            advance(done, description=f"writing {text_set.name}")
            on_text = partial(_count, advance, done)
            started = time.monotonic()
            answers = llm_engine.generate(task.prompts, task.sampling, task.steer, on_text=on_text)
            timings.generated(answers, time.monotonic() - started)
            run.write(text_set, answers)
            done += task.count


def _count(advance: ProgressCallback, offset: int, count: int) -> None:
    advance(offset + count)
