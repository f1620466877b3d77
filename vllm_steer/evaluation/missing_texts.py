"""Generates the texts that a run's folder does not have yet."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from vllm_steer.evaluation.generation import EngineOptions, engine
from vllm_steer.evaluation.run import Run, TextSet
from vllm_steer.evaluation.sampling import Sampling


class ProgressCallback(Protocol):
    """``advance(done)`` moves a bar of progress; ``said`` replaces its text."""

    def __call__(self, done: int, *, said: str | None = None) -> None: ...


Progress = Callable[[str, int | None], AbstractContextManager[ProgressCallback]]


@dataclass(frozen=True)
class GenerationTask:
    """Texts under a setting: after which prompts, and with which ``steer`` of a request."""

    setting: TextSet
    prompts: Sequence[str]
    sampling: Sampling
    steer: Mapping[str, Any] | None

    @property
    def count(self) -> int:
        """How many they are."""
        return len(self.prompts) * self.sampling.samples


def write_missing(
    run: Run,
    wanted: Sequence[GenerationTask],
    model: str,
    steers: Mapping[str, Path],
    options: EngineOptions,
    progress: Progress,
) -> None:
    """Generate the texts that the run lacks; an engine is started for them, and gone afterwards.

    ``steers`` are the files of the steers by the names that requests have for them.
    """
    each_once = {texts.setting.name: texts for texts in wanted}
    missing = run.missing([texts.setting for texts in each_once.values()])
    if not missing:
        return
    total = sum(texts.count for texts in each_once.values())
    done = total - sum(each_once[setting.name].count for setting in missing)
    with (
        progress("starting vLLM", total) as advance,
        engine(model, steers, options) as running,
    ):
        for setting in missing:
            texts = each_once[setting.name]
            advance(done, said=f"writing {setting.name}")
            on_text = partial(_count, advance, done)
            answers = running.generate(texts.prompts, texts.sampling, texts.steer, on_text=on_text)
            run.write(setting, answers)
            done += texts.count


def _count(advance: ProgressCallback, before: int, texts: int) -> None:
    advance(before + texts)
