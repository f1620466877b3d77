"""Evidence, compared with two forward passes that apply the steer's equation."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from vllm_steer import LMSteer, SteerError, VectorSteer
from vllm_steer.inspection import Evidence, text_evidence, token_evidence
from vllm_steer.models import LanguageModel
from vllm_steer.steers import DeltaSteer

WORDS = ("<s>", "<unk>", "the", "room", "was", "good", "bad", "and", "so", "dark", ".")
TEXT = "the room was good and the room was so dark ."
HIDDEN = 8


def word_tokenizer(*, begins: bool) -> Any:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if begins:
        words.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=HIDDEN,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(config).double().eval()
    return LanguageModel("tiny", llama, word_tokenizer(begins=True))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def multiply(**fields: Any) -> LMSteer:
    return LMSteer(
        variant="multiply",
        epsilon=0.4,
        hidden_size=HIDDEN,
        projector1=normal(2, HIDDEN, 3, seed=1),
        projector2=normal(2, HIDDEN, 3, seed=2),
        **fields,
    )


def log_likelihoods(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """``log p(x_t | x_<t)`` for t = 1 .. n-1, one token at a time."""
    values = []
    for t in range(1, len(ids)):
        probabilities = logits[t - 1].exp() / logits[t - 1].exp().sum()
        values.append(probabilities[ids[t]].log())
    return torch.stack(values)


def ids_of(text: str) -> torch.Tensor:
    return torch.tensor([0, *(WORDS.index(word) for word in text.split())])


@pytest.mark.parametrize("strength", [1.0, -0.7, 3.0])
def test_evidence_is_the_difference_of_two_log_likelihoods(
    model: LanguageModel, strength: float
) -> None:
    steer, ids = multiply(fixed_columns=(1,)), ids_of(TEXT)
    h = model.model.model(input_ids=ids[None]).last_hidden_state[0].detach()
    head = model.model.lm_head.weight.detach()
    readings = []
    for v in (strength, -strength):
        # The fixed column enters with 1 on either side.
        w = v * steer.projector1[0] @ steer.projector2[0].T
        w = w + steer.projector1[1] @ steer.projector2[1].T
        readings.append(log_likelihoods((h + 0.4 * (h @ w)) @ head.T, ids))
    evidence = token_evidence(model.model, steer, ids, strength=strength)
    torch.testing.assert_close(evidence, readings[0] - readings[1], rtol=1e-9, atol=1e-11)
    assert len(evidence) == len(ids) - 1


def test_a_vector_in_the_layers_is_read_too(model: LanguageModel) -> None:
    w, ids = normal(1, HIDDEN, seed=3), ids_of(TEXT)
    steer = VectorSteer(vectors=w, layers=(1,), site="resid")
    readings = []
    for v in (2.0, -2.0):
        # Layer 1 is the last: what it adds meets the final norm and the head.
        stream = {}
        hook = model.model.model.layers[1].register_forward_hook(
            lambda _m, _a, out, captured=stream: captured.update(
                h=out[0] if type(out) is tuple else out
            )
        )
        model.model(input_ids=ids[None])
        hook.remove()
        h = model.model.model.norm(stream["h"] + v * w)[0]
        readings.append(log_likelihoods((h @ model.model.lm_head.weight.T).detach(), ids))
    evidence = token_evidence(model.model, steer, ids, strength=2.0)
    torch.testing.assert_close(evidence, readings[0] - readings[1], rtol=1e-9, atol=1e-11)


def test_a_delta_begins_at_the_first_token(model: LanguageModel) -> None:
    delta = normal(2, 1, HIDDEN, seed=4)  # two steps, so tokens 0 and 1 are changed
    steer = DeltaSteer(delta=delta, layers=(1,), site="resid")
    ids = ids_of("the room was good")
    evidence = token_evidence(model.model, steer, ids, strength=1.0)
    # What is added to the last layer's output at tokens 0 and 1 alone moves tokens 1 and 2 alone.
    assert (evidence[:2].abs() > 1e-6).all()
    assert (evidence[2:] == 0).all()


def test_first_token_has_no_evidence(model: LanguageModel) -> None:
    without = LanguageModel("tiny", model.model, word_tokenizer(begins=False))
    assert len(text_evidence(without, multiply(), "the room").tokens) == 1
    assert len(text_evidence(model, multiply(), "the room").tokens) == 2


def test_swapping_the_sign_swaps_the_sides(model: LanguageModel) -> None:
    plus, minus = (text_evidence(model, multiply(), TEXT, strength=v) for v in (1.0, -1.0))
    assert plus.total == pytest.approx(-minus.total, rel=1e-9)
    assert [s.text for s in plus.spans_for] == [s.text for s in minus.spans_against]
    assert plus.label == -minus.label != 0


@pytest.mark.parametrize("begins", [True, False], ids=["with <s>", "without"])
def test_spans_have_the_positions_of_their_tokens(model: LanguageModel, begins: bool) -> None:
    reader = LanguageModel("tiny", model.model, word_tokenizer(begins=begins))
    evidence = text_evidence(reader, multiply(), TEXT, longest=1)
    words, moved = TEXT.split(), int(begins)
    output = [*evidence.spans_for, *evidence.spans_against]
    assert len(evidence.spans_for) == 4
    for span in output:
        assert span.first_token == span.last_token
        # Trap: evidence t is of token t + 1.
        assert span.evidence == pytest.approx(evidence.tokens[span.first_token - 1])
        assert TEXT[span.begin : span.end] == span.text == words[span.first_token - moved]
    assert {s.first_token for s in output if s.evidence > 0} == set(
        sorted(range(1, len(evidence.tokens) + 1), key=lambda t: -evidence.tokens[t - 1])[:4]
    )


def test_spans_of_several_tokens_reach_from_first_to_last(model: LanguageModel) -> None:
    actual = text_evidence(model, multiply(), TEXT, spans=1)
    (span,) = actual.spans_for
    words = TEXT.split()[span.first_token - 1 : span.last_token]
    assert span.text.split() == words
    evidence = actual.tokens[span.first_token - 1 : span.last_token]
    assert span.evidence == pytest.approx(sum(evidence))


def test_label_is_the_sign_of_the_total() -> None:
    for tokens, label in (((1.0, -0.5), 1), ((0.5, -1.0), -1), ((1.0, -1.0), 0)):
        assert Evidence("", 1.0, tokens, (), ()).label == label


@pytest.mark.parametrize("strength", [0.0, float("nan"), float("inf")])
def test_a_strength_of_zero_is_refused(model: LanguageModel, strength: float) -> None:
    with pytest.raises(SteerError, match=r"strength is .*give a finite strength other than 0"):
        text_evidence(model, multiply(), TEXT, strength=strength)


def test_a_text_of_one_token_is_refused(model: LanguageModel) -> None:
    reader = LanguageModel("tiny", model.model, word_tokenizer(begins=False))
    with pytest.raises(SteerError, match="the text 'room' has 1 tokens; the first has no evidence"):
        text_evidence(reader, multiply(), "room")


def test_a_text_longer_than_the_model_reads_is_refused(model: LanguageModel) -> None:
    with pytest.raises(
        SteerError, match="has 33 tokens and the maximum of model tiny is 32; split"
    ):
        text_evidence(model, multiply(), "so " * 32)
    assert len(text_evidence(model, multiply(), "so " * 31).tokens) == 31


def test_a_tokenizer_without_offsets_is_refused(model: LanguageModel) -> None:
    slow = LanguageModel("tiny", model.model, SimpleNamespace(is_fast=False))
    with pytest.raises(SteerError, match="model tiny: its tokenizer does not report the offsets"):
        text_evidence(slow, multiply(), TEXT)


def test_a_steer_of_another_width_is_refused(model: LanguageModel) -> None:
    steer = LMSteer(variant="add", epsilon=1.0, hidden_size=5, add=torch.ones(1, 5))
    with pytest.raises(SteerError, match="the steer's width is 5; the model's LM head has 8"):
        text_evidence(model, steer, TEXT)


def test_the_model_is_left_as_it_was(model: LanguageModel) -> None:
    ids = ids_of(TEXT)[None]
    before = model.model(input_ids=ids).logits
    text_evidence(model, multiply(), TEXT)
    assert torch.equal(model.model(input_ids=ids).logits, before)
