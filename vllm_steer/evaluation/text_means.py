"""Judges of single texts: their figures are means over a prompt's texts, then over prompts."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from vllm_steer.evaluation.answers import Answers, OnText, ignore_count
from vllm_steer.evaluation.means import mean


class TextMeanJudge:
    """A judge that reads continuations one by one; ``names`` are its figures."""

    names: ClassVar[tuple[str, ...]]

    def of_text(self, text: str) -> Mapping[str, float]:
        """The figures of one continuation."""
        raise NotImplementedError

    def observe(
        self, answers: Sequence[Answers], on_text: OnText = ignore_count
    ) -> list[list[Mapping[str, float]]]:
        """The figures of each prompt's texts."""
        known: dict[str, Mapping[str, float]] = {}  # steered texts are often equal
        observations, done = [], 0
        for answer in answers:
            for text in answer.texts:
                if text not in known:
                    known[text] = self.of_text(text)
            observations.append([known[text] for text in answer.texts])
            done += len(answer.texts)
            on_text(done)
        return observations

    def figures(self, observations: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, float]:
        """The mean of each figure; NaN without texts."""
        return {
            name: mean(mean(figures[name] for figures in texts) for texts in observations)
            for name in self.names
        }

    def scores(self, answers: Sequence[Answers]) -> dict[str, float]:
        """The figures of all texts."""
        return self.figures(self.observe(answers))
