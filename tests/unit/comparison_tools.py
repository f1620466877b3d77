"""A fake engine and a fake judge for tests of comparisons."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_steer.evaluation.answers import Answers
from vllm_steer.evaluation.sampling import Sampling

TEXTS = 4


def value(dose: Mapping[str, Any]) -> float:
    """The effect of a dose in the fake engine: a dynamic strength acts as half of its maximum."""
    return dose["max"] / 2 if dose["strength"] == "dynamic" else dose["strength"]


@dataclass
class FakeEngine:
    """A fake engine: of 4 texts, ``strength of a`` have `oui` and ``strength of b`` have `good`.

    In a combination, a fixed ``b`` reduces the effect of ``a`` by 1; a dynamic one does not.
    """

    requests: list[Any] = field(default_factory=list)
    started: int = 0
    fails_after: int = 1000

    @contextmanager
    def engine(self, model: str, files: Mapping[str, Path], options: Any) -> Iterator["FakeEngine"]:
        assert all(path.exists() for path in files.values())
        self.started += 1
        yield self

    def generate(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        steer: Mapping[str, Any] | None = None,
        *,
        on_text: Callable[[int], None] | None = None,
    ) -> list[Answers]:
        if len(self.requests) == self.fails_after:
            raise KeyboardInterrupt
        self.requests.append((tuple(prompts), steer))
        steer = steer or {}
        strengths = {name: value(dose) for name, dose in steer.items()}
        if "a" in steer and "b" in steer and steer["b"]["strength"] != "dynamic":
            strengths["a"] -= 1
        texts = tuple(
            (" oui" if k < strengths.get("a", 0) else " no")
            + (" good" if k < strengths.get("b", 0) else " bad")
            for k in range(sampling.samples)
        )
        dynamic = {n: (2.0, 1.0) for n, dose in steer.items() if dose["strength"] == "dynamic"}
        strengths_by_text = tuple(dynamic for _ in texts) if dynamic else ()
        return [Answers(prompt, texts, strengths_by_text) for prompt in prompts]


@dataclass(frozen=True)
class FakePerplexity:
    """A fake perplexity judge: 2, plus 1 for each `oui` in four texts."""

    name: str = "perplexity:m"
    effect: None = None

    def scores(self, answers: Sequence[Answers]) -> dict[str, float]:
        texts = [text for answer in answers for text in answer.texts]
        number = 2 + 4 * sum("oui" in text for text in texts) / len(texts)
        return {"total_perplexity": number, "median": number}
