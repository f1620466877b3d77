"""Measures how much of a steer's effect a transferred steer keeps, on labelled texts.

    effect = mean over texts of sign(label) * sum_t (log p_{+v}(x_t) - log p_{-v}(x_t))

Two tokenizers split a text into different numbers of tokens, so models are compared by the evidence
per text; the evidence per token is reported as well.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from vllm_steer.errors import SteerError
from vllm_steer.inspection.evidence import text_evidence
from vllm_steer.models import LanguageModel
from vllm_steer.steers import LMSteer
from vllm_steer.texts import LabelledText

_TRIALS: Final = 12
_CLOSE_ENOUGH: Final = 0.02


@dataclass(frozen=True)
class Effect:
    """Mean evidence for the texts' labels, in nats, and the share of labels with its sign."""

    texts: int
    strength: float
    evidence_per_text: float
    evidence_per_token: float
    accuracy: float


def measure_effect(
    model: LanguageModel,
    steer: LMSteer,
    texts: Sequence[LabelledText],
    *,
    strength: float = 1.0,
    on_text: Callable[[int], None] = lambda _: None,
) -> Effect:
    """The effect of a steer on labelled texts; texts with label 0 are ignored.

    ``on_text`` receives the number of texts measured so far. Raises ``SteerError`` if every label
    is 0, and as ``text_evidence`` does.
    """
    labelled = [text for text in texts if text.label != 0]
    if not labelled:
        raise SteerError("every label is 0; expected labels above and below 0")
    total, tokens, correct = 0.0, 0, 0
    for done, (text, label) in enumerate(labelled, 1):
        evidence = text_evidence(model, steer, text, strength=strength, spans=0)
        side = 1 if label > 0 else -1
        total += side * evidence.total
        tokens += len(evidence.tokens)
        correct += evidence.label == side
        on_text(done)
    count = len(labelled)
    return Effect(count, strength, total / count, total / tokens, correct / count)


def match_strength(
    model: LanguageModel,
    steer: LMSteer,
    texts: Sequence[LabelledText],
    target: Effect,
    *,
    on_trial: Callable[[int], None] = lambda _: None,
) -> tuple[LMSteer, Effect]:
    """Scale the steer's epsilon until its effect per text is that of ``target``, within 2%.

    The effect grows about in proportion to epsilon, so each trial multiplies epsilon by the ratio
    of the effects. Fixed columns are scaled too, since one map transferred all columns.
    ``on_trial`` receives the number of trials so far. Returns the steer and its effect.

    Raises ``SteerError`` if an effect is not above 0, or if no trial reaches the target.
    """
    effect = measure_effect(model, steer, texts, strength=target.strength)
    for trial in range(1, _TRIALS + 1):
        if target.evidence_per_text <= 0 or effect.evidence_per_text <= 0:
            raise SteerError(
                f"the evidence for the labels is {target.evidence_per_text:.3g} nats per text in "
                f"the source model and {effect.evidence_per_text:.3g} in the target; strengths can "
                "be matched only where both are above 0"
            )
        factor = target.evidence_per_text / effect.evidence_per_text
        if abs(factor - 1) <= _CLOSE_ENOUGH:
            return steer, effect
        steer = replace(steer, epsilon=steer.epsilon * factor)
        effect = measure_effect(model, steer, texts, strength=target.strength)
        on_trial(trial)
    raise SteerError(
        f"after {_TRIALS} trials the evidence is {effect.evidence_per_text:.3g} nats per text and "
        f"not {target.evidence_per_text:.3g}; give a smaller --strength, or tune it by hand"
    )
