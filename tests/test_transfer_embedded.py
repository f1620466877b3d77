"""The embedded model's sentiment steer keeps at least half of its effect in a second model.

The effect is measured on sampled texts: the share of positive texts by the lexicon, at +v minus
that at -v. The transfer itself does not use it.
"""

from pathlib import Path
from typing import Any

import pytest
from measure import sample

from vllm_steer import LMSteer, load_steer
from vllm_steer.embedded import STEERS, corpus, lexicon
from vllm_steer.inspection import read_output_embedding
from vllm_steer.models import load_language_model
from vllm_steer.texts import LabelledText
from vllm_steer.transfer import Solver, TransferResult, measure_effect, transfer_steer

SISTER = Path(__file__).parent / "models" / "sister"
SAMPLES = 20  # of each of 12 prompts: a standard error of 0.03 for a share
STRENGTH = 5.0
# The map keeps a part of the steer, so the target is given more of it; stated in docs/transfer.md.
TARGET_STRENGTH = 8.0


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    names = {"source": "embedded", "target": str(SISTER)}
    return {side: load_language_model(name, device="cpu") for side, name in names.items()}


@pytest.fixture(scope="module")
def steer() -> LMSteer:
    loaded = load_steer(STEERS / "sentiment.safetensors")
    assert isinstance(loaded, LMSteer)
    return loaded


def transferred(models: dict[str, Any], steer: LMSteer, solver: Solver) -> TransferResult:
    source, target = (
        (read_output_embedding(models[side].name), models[side].tokenizer)
        for side in ("source", "target")
    )
    return transfer_steer(steer, source, target, solver=solver)


def gap(model: Any, steer: LMSteer, strength: float, samples: int = SAMPLES) -> float:
    """The share of positive texts at +strength minus that at -strength."""
    shares = [
        lexicon.positive_share(
            sample(
                model.model,
                model.tokenizer,
                {"sentiment": v},
                {"sentiment": steer},
                prompts=corpus.NEUTRAL_PROMPTS,
                samples=samples,
            )
        )
        for v in (strength, -strength)
    ]
    return shares[0] - shares[1]


def test_half_of_the_effect_is_kept_in_generated_text(
    models: dict[str, Any], steer: LMSteer
) -> None:
    moved = transferred(models, steer, "orthogonal").steer
    source = gap(models["source"], steer, STRENGTH)
    target = gap(models["target"], moved, TARGET_STRENGTH)
    assert source > 0.7
    assert target >= 0.5 * source


def test_wrongly_matched_tokens_keep_no_effect(models: dict[str, Any], steer: LMSteer) -> None:
    result = transferred(models, steer, "orthogonal")
    rows = read_output_embedding(str(SISTER))
    table = models["target"].tokenizer.get_vocab()
    shifted = _Vocabulary({token: (number + 1) % len(rows) for token, number in table.items()})
    source = read_output_embedding("embedded"), models["source"].tokenizer
    mismatched = transfer_steer(steer, source, (rows, shifted))
    assert mismatched.fit is not None and result.fit is not None
    assert mismatched.fit.mean_cosine < 0.7 * result.fit.mean_cosine
    assert abs(gap(models["target"], mismatched.steer, TARGET_STRENGTH, samples=8)) < 0.2


def test_generated_texts_show_the_effect_of_the_transferred_steer(
    models: dict[str, Any], steer: LMSteer
) -> None:
    samples = corpus.generate(60, seed=11, language="en")
    texts = [LabelledText(s.text, 1.0 if s.sentiment == "positive" else -1.0) for s in samples]
    moved = transferred(models, steer, "orthogonal").steer
    source = measure_effect(models["source"], steer, texts, strength=STRENGTH)
    target = measure_effect(models["target"], moved, texts, strength=TARGET_STRENGTH)
    assert source.accuracy > 0.9
    assert target.evidence_per_text > 0.2 * source.evidence_per_text


class _Vocabulary:
    """A tokenizer with only a vocabulary."""

    def __init__(self, numbers: dict[str, int]) -> None:
        self._numbers = numbers

    def get_vocab(self) -> dict[str, int]:
        return self._numbers
