"""A fake engine and a fake judge for tests of evaluations."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_steer import VectorSteer, save_steer
from vllm_steer.evaluation import missing_texts
from vllm_steer.evaluation.answers import Answers
from vllm_steer.evaluation.sampling import Sampling
from vllm_steer.sweep import sweep_run


@dataclass
class FakeEngine:
    """A fake engine: 10 + 2 * strength of 20 texts are `good`; it records its requests."""

    requests: list[Any] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)
    fails_after: int = 1000

    @contextmanager
    def engine(self, model: str, files: Mapping[str, Path], options: Any) -> Iterator["FakeEngine"]:
        assert all(path.exists() for path in files.values())
        self.files = dict(files)
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
        self.requests.append(steer)
        strength = 0.0 if steer is None else steer.get("steer", {}).get("strength", 0.0)
        good = 10 + int(2 * strength)
        return [
            Answers(p, tuple(" good" if k < good else " bad" for k in range(20))) for p in prompts
        ]


@dataclass(frozen=True)
class FakePerplexity:
    """A fake perplexity judge: 4 times 1 plus the share of good texts above one half."""

    name: str = "perplexity:m"
    effect: None = None

    def scores(self, answers: Sequence[Answers]) -> dict[str, float]:
        texts = [text for answer in answers for text in answer.texts]
        return {"total_perplexity": 4 * (0.5 + max(0.5, texts.count(" good") / len(texts)))}


@pytest.fixture
def fake_engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    engine = FakeEngine()
    monkeypatch.setattr(missing_texts, "engine", engine.engine)
    monkeypatch.setattr(sweep_run, "engine", engine.engine)
    from vllm_steer.evaluation import judges

    monkeypatch.setitem(judges._BUILDERS, "perplexity", lambda *_: FakePerplexity())  # type: ignore[index]
    return engine


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a steer, prompts and a lexicon."""
    rows = torch.arange(1.0, 13.0).view(4, 3)
    save_steer(VectorSteer(vectors=rows, layers=(0, 1, 2, 3)), tmp_path / "v")
    (tmp_path / "prompts.txt").write_text("It was\nShe was\n")
    (tmp_path / "words.yaml").write_text("positive: [good]\nnegative: [bad]\n")
    return tmp_path
