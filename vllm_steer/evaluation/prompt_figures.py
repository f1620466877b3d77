"""Judges whose figures are means over prompts of one value per prompt."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from vllm_steer.evaluation.answers import Answers, OnText, ignore_count
from vllm_steer.evaluation.means import mean


class MeanJudge:
    """A judge that finds the figures ``names`` of each prompt by itself; the report has their
    means.
    """

    names: ClassVar[tuple[str, ...]]

    def of_prompt(self, answer: Answers) -> Mapping[str, float]:
        """The figures of one prompt's texts; NaN for one that they do not define."""
        raise NotImplementedError

    def observe(
        self, answers: Sequence[Answers], on_text: OnText = ignore_count
    ) -> list[Mapping[str, float]]:
        """The figures of each prompt."""
        observations, done = [], 0
        for answer in answers:
            observations.append(self.of_prompt(answer))
            done += len(answer.texts)
            on_text(done)
        return observations

    def figures(self, observations: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """The mean of each figure over the prompts that define it; NaN where none does."""
        return {name: mean(figures[name] for figures in observations) for name in self.names}

    def scores(self, answers: Sequence[Answers]) -> dict[str, float]:
        """The figures of all prompts."""
        return self.figures(self.observe(answers))
