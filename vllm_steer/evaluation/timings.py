"""How long a run took to generate and to judge its texts."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from vllm_steer.evaluation.answers import Answers, num_texts


@dataclass
class Timings:
    """Texts and tokens that this process has generated, and the seconds that it took.

    ``generation_s`` does not include the start of the engine. Texts that a run folder already had
    do not count.
    """

    texts: int = 0
    tokens: int = 0
    generation_s: float = 0.0
    judging_s: float = 0.0

    def generated(self, answers: Sequence[Answers], seconds: float) -> None:
        """Add texts and the seconds that they took."""
        self.texts += num_texts(answers)
        self.tokens += sum(answer.num_tokens for answer in answers)
        self.generation_s += seconds

    @contextmanager
    def judging(self) -> Iterator[None]:
        """Add the seconds that a block takes."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.judging_s += time.monotonic() - started

    def __str__(self) -> str:
        """One line such as ``generated 96 texts, 1,920 tokens in 4.0 s (24 texts/s, 480 tokens/s);
        judged in 1.5 s``.
        """
        generated = "generated no new texts"
        if self.texts:
            seconds = max(self.generation_s, 1e-9)
            generated = (
                f"generated {self.texts:,} texts, {self.tokens:,} tokens in "
                f"{_seconds(self.generation_s)} ({_rate(self.texts / seconds)} texts/s, "
                f"{_rate(self.tokens / seconds)} tokens/s)"
            )
        return f"{generated}; judged in {_seconds(self.judging_s)}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:,.0f} s"


def _rate(rate: float) -> str:
    return f"{rate:.2g}" if rate < 10 else f"{rate:,.0f}"
