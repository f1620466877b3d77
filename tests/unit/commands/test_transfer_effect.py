"""The effect on labelled texts and the matching of strengths, on a tiny model."""

import pytest
import torch
import transformers

from vllm_steer import LMSteer, SteerError
from vllm_steer.embedded import MODEL
from vllm_steer.models import LanguageModel
from vllm_steer.texts import LabelledText
from vllm_steer.transfer import Effect, match_strength, measure_effect

HIDDEN = 16
TEXTS = [
    LabelledText("The hotel was wonderful.", 1.0),
    LabelledText("The flat was dreadful and damp.", -1.0),
    LabelledText("Nothing.", 0.0),
    LabelledText("The staff was kind.", 0.5),
]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(config).double().eval().requires_grad_(False)
    return LanguageModel("tiny", llama, tokenizer)


def add_steer(model: LanguageModel, epsilon: float = 0.5) -> LMSteer:
    """A steer towards the embeddings of the positive texts and away from the negative ones."""
    head = model.model.get_output_embeddings().weight
    sides = [
        head[torch.tensor(model.tokenizer(TEXTS[row].text)["input_ids"])].sum(0) for row in (0, 1)
    ]
    return LMSteer(
        variant="add", epsilon=epsilon, hidden_size=HIDDEN, add=100 * (sides[0] - sides[1])[None]
    )


def totals(model: LanguageModel, steer: LMSteer, strength: float) -> list[tuple[float, int]]:
    """``log p_{+v}(x) - log p_{-v}(x)`` of each text, and its number of predicted tokens."""
    result = []
    for text, label in TEXTS:
        if label == 0:
            continue
        ids = torch.tensor(model.tokenizer(text)["input_ids"])
        h = model.model.model(input_ids=ids[None]).last_hidden_state[0]
        head = model.model.get_output_embeddings().weight
        total = 0.0
        for sign in (1, -1):
            logits = (h + sign * strength * steer.epsilon * steer.add[0]) @ head.T
            token_logits = logits.log_softmax(1)[:-1].gather(1, ids[1:, None])
            total += sign * token_logits.sum().item()
        result.append((total, len(ids) - 1))
    return result


def test_effect_is_the_evidence_for_the_texts_own_labels(model: LanguageModel) -> None:
    steer = add_steer(model)
    (first, n1), (second, n2), (third, n3) = totals(model, steer, 2.0)
    result = measure_effect(model, steer, TEXTS, strength=2.0)
    signed = [first, -second, third]
    assert (result.texts, result.strength) == (3, 2.0)
    assert result.evidence_per_text == pytest.approx(sum(signed) / 3, rel=1e-9)
    assert result.evidence_per_token == pytest.approx(sum(signed) / (n1 + n2 + n3), rel=1e-9)
    assert result.accuracy == pytest.approx(sum(total > 0 for total in signed) / 3)


def test_every_labelled_text_is_counted(model: LanguageModel) -> None:
    counts: list[int] = []
    measure_effect(model, add_steer(model), TEXTS, on_text=counts.append)
    assert counts == [1, 2, 3]


def test_matched_epsilon_gives_the_requested_effect(model: LanguageModel) -> None:
    expected = measure_effect(model, add_steer(model, epsilon=0.5), TEXTS)
    steer, effect = match_strength(model, add_steer(model, epsilon=0.02), TEXTS, expected)
    assert effect.evidence_per_text == pytest.approx(expected.evidence_per_text, rel=0.02)
    assert steer.epsilon == pytest.approx(0.5, rel=0.1)
    assert measure_effect(model, steer, TEXTS) == effect


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_steer_against_the_labels_cannot_be_matched(model: LanguageModel, side: str) -> None:
    steer = add_steer(model)
    against = LMSteer(variant="add", epsilon=0.5, hidden_size=HIDDEN, add=-steer.add)
    value = {"source": (against, steer), "target": (steer, against)}[side]
    with pytest.raises(SteerError, match=r"strengths can be matched only where both are above 0"):
        match_strength(model, value[1], TEXTS, measure_effect(model, value[0], TEXTS))


def test_an_unreachable_effect_is_refused(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Effect(
        texts=3, strength=1.0, evidence_per_text=1.0, evidence_per_token=1, accuracy=1
    )
    stuck = Effect(texts=3, strength=1.0, evidence_per_text=0.5, evidence_per_token=1, accuracy=1)
    monkeypatch.setattr("vllm_steer.transfer.effect.measure_effect", lambda *_, **__: stuck)
    with pytest.raises(SteerError, match=r"after 12 trials the evidence is 0\.5 nats per text"):
        match_strength(model, add_steer(model), TEXTS, expected)


def test_texts_without_a_label_are_refused(model: LanguageModel) -> None:
    with pytest.raises(SteerError, match="every label is 0; expected labels above and below 0"):
        measure_effect(model, add_steer(model), [LabelledText("Nothing.", 0.0)])
