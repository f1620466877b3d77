"""Conditional perplexity, compared with the mean loss of single texts in float64."""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from outside import STORIES, needs
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from vllm_steer import SteerError
from vllm_steer.evaluation import perplexity
from vllm_steer.evaluation.answers import Answers
from vllm_steer.evaluation.judges import make_judge
from vllm_steer.evaluation.perplexity import Likelihood, PerplexityJudge, likelihoods, summary
from vllm_steer.hf import lm_head
from vllm_steer.models import LanguageModel, load_language_model

WORDS = ("<s>", "the", "hotel", "was", "good", "bad", "very", "and", "clean", "loud")
ANSWERS = (
    Answers("the hotel was", (" very good", " bad", " loud and very very bad and loud")),
    Answers("hotel was", (" clean and good and clean", " good")),
)


@cache
def gpt2() -> LanguageModel:
    """A tiny GPT-2 with a word tokenizer that, like GPT-2's, adds no beginning-of-text token."""
    tokenizer = Tokenizer(
        models.WordLevel({word: folder for folder, word in enumerate(WORDS)}, unk_token="<s>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(WORDS), n_positions=12, n_embd=8, n_layer=2, n_head=2, bos_token_id=0
    )
    config.initializer_range = 1.0
    return LanguageModel(
        "words",
        GPT2LMHeadModel(config).double().eval(),
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>"),
    )


def loss(judge: LanguageModel, text: str) -> tuple[float, int]:
    """Mean negative log-likelihood of all tokens but the first, and their number."""
    ids = judge.tokenizer(text)["input_ids"]
    with torch.no_grad():
        p = judge.model(input_ids=torch.tensor([ids])).logits[0].double().softmax(-1)
    likelihood = [-math.log(p[index, token].item()) for index, token in enumerate(ids[1:])]
    return sum(likelihood) / len(likelihood), len(ids)


def expected(judge: LanguageModel, prompt: str, text: str) -> float:
    before, n_p = loss(judge, prompt)
    full, n_f = loss(judge, prompt + text)
    return math.exp((full * (n_f - 1) - before * (n_p - 1)) / (n_f - n_p))


def flat(judge: LanguageModel, answers: Sequence[Answers]) -> list[float]:
    return [
        expected(judge, likelihood.prompt, text)
        for likelihood in answers
        for text in likelihood.texts
    ]


@pytest.mark.parametrize("at_once", [1 << 11, 1], ids=["one batch", "one by one"])
@pytest.mark.parametrize("has_plain_head", [True, False])
def test_perplexity_is_conditional_on_the_prompt(
    at_once: int, has_plain_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexity, "_TOKENS", at_once)
    monkeypatch.setattr(perplexity, "_LOGITS", at_once)
    monkeypatch.setitem(lm_head._LOGITS_AT_ONCE, "cpu", at_once)
    if not has_plain_head:
        monkeypatch.setattr(perplexity, "_plain_head", lambda model, row: None)
    counts: list[int] = []
    likelihoods_found = [one.perplexity for one in likelihoods(gpt2(), ANSWERS, counts.append)]
    assert likelihoods_found == pytest.approx(flat(gpt2(), ANSWERS), rel=1e-9)
    assert counts == ([0, 5] if at_once > 1 else [0, 1, 2, 3, 4, 5])


HEADS: dict[str, Any] = {
    "Gemma2": {"head_dim": 4, "query_pre_attn_scalar": 4, "final_logit_softcapping": 0.4},
    "Cohere": {"logit_scale": 3.0},
    "Granite": {"logits_scaling": 0.25},
    "Phi": {},  # its head has a bias
}


@pytest.mark.parametrize("kind", HEADS)
def test_logits_by_parts_are_the_models_own(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        **HEADS[kind],
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    rows = [torch.randint(0, 50, (length,)).tolist() for length in (9, 3, 1, 7, 7)]
    given = [4, 0, 1, 7, 1]
    expected = []
    for row, first in zip(rows, given, strict=True):
        logs = model(torch.tensor([row])).logits[0].log_softmax(-1)
        scored = range(max(first, 1), len(row))
        expected.append(sum(-logs[t - 1, row[t]].item() for t in scored) if row[1:] else math.nan)
    monkeypatch.setitem(lm_head._LOGITS_AT_ONCE, "cpu", 150)  # 3 tokens
    assert perplexity._plain_head(model, rows[0]) is not None
    found = perplexity.text_nll(model, rows, given)
    assert found == pytest.approx(expected, rel=1e-9, nan_ok=True)


def test_a_model_whose_logits_are_not_those_of_its_head_is_asked_for_them() -> None:
    """Here a hook changes its logits; the likelihoods are those of the changed ones."""
    judge = gpt2()
    hook = judge.model.register_forward_hook(lambda _m, _a, output: _doubled(output))
    try:
        assert perplexity._plain_head(judge.model, [1, 2, 3]) is None
        found = [likelihood.perplexity for likelihood in likelihoods(judge, ANSWERS)]
        assert found == pytest.approx(flat(judge, ANSWERS), rel=1e-9)
    finally:
        hook.remove()


def _doubled(output: Any) -> Any:
    output.logits = output.logits * 2
    return output


def test_a_prompt_whose_last_token_joins_the_text_counts_in_full() -> None:
    """The prompt ends in ``hot``, the text goes on to ``hotel``: both likelihoods count."""
    tokenizer = Tokenizer(
        models.WordPiece({"<s>": 0, "the": 1, "was": 2, "hot": 3, "hotel": 4}, unk_token="<s>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    judge = LanguageModel("pieces", gpt2().model, words)
    answers = [Answers("the hot", ("el was the", " was"))]
    assert judge.tokenizer("the hotel was")["input_ids"] == [1, 4, 2]
    found = [likelihood.perplexity for likelihood in likelihoods(judge, answers)]
    assert found == pytest.approx(flat(judge, answers), rel=1e-9)


def test_logits_are_computed_for_scored_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    raw_logits = lm_head.LMHead.raw_logits

    def counted(head: lm_head.LMHead, states: torch.Tensor) -> torch.Tensor:
        computed.append(len(states))
        return raw_logits(head, states)

    monkeypatch.setitem(lm_head._LOGITS_AT_ONCE, "cpu", 4 * len(WORDS))
    monkeypatch.setattr(perplexity, "_plain_head", lambda model, row: lm_head.head_of(model))
    monkeypatch.setattr(lm_head.LMHead, "raw_logits", counted)
    likelihoods(gpt2(), ANSWERS)
    # Tokens of the continuations: 2 + 1 + 7 + 5 + 1, at most 4 at once.
    assert computed == [4, 4, 4, 4]


def test_a_tokenizer_that_begins_texts_is_used_as_it_is() -> None:
    judge = load_language_model("embedded", device="cpu")
    answers = [Answers("The", (" hotel was good.",)), Answers("The film was", (" bad.", " long"))]
    likelihoods_found = [likelihood.perplexity for likelihood in likelihoods(judge, answers)]
    assert likelihoods_found == pytest.approx(flat(judge, answers), rel=1e-4)


@needs(STORIES)
def test_a_real_model_finds_its_own_stories_likelier() -> None:
    judge = make_judge(f"perplexity:{STORIES}", device="cpu")
    story = judge.scores([Answers("Once upon a time, there was a", (" little girl named Lily.",))])
    salad = judge.scores([Answers("Once upon a time, there was a", (" named. Lily girl little",))])
    assert story["perplexity"] < 20 < salad["median"]


def test_a_prompt_of_one_token_gives_no_perplexity() -> None:
    (likelihoods_found,) = likelihoods(gpt2(), [Answers("hotel", (" was good",))])
    assert math.isnan(likelihoods_found.perplexity)


def test_a_prompt_that_is_only_the_beginning_token_costs_nothing() -> None:
    (likelihoods_found,) = likelihoods(gpt2(), [Answers("<s>", (" hotel was",))])
    mean, tokens = loss(gpt2(), "<s> hotel was")
    assert likelihoods_found.perplexity == pytest.approx(math.exp(mean * (tokens - 1) / 2))


def test_a_text_that_adds_no_token_gives_no_perplexity() -> None:
    (likelihoods_found,) = likelihoods(gpt2(), [Answers("the hotel", ("",))])
    assert math.isnan(likelihoods_found.perplexity)


def of(*values: float) -> list[Likelihood]:
    """Texts of two tokens with these perplexities."""
    return [Likelihood(2 * math.log(value), 2) for value in values]


def test_outliers_are_left_out_of_the_authors_mean_only() -> None:
    figures = summary(of(10, 30, 40, 1e5))
    assert figures["perplexity"] == pytest.approx((10 + 30 + 40) / 3)
    assert figures["dropped"] == pytest.approx(1 / 4)
    assert figures["median"] == pytest.approx(35)
    assert figures["total_perplexity"] == pytest.approx((10 * 30 * 40 * 1e5) ** (1 / 4))


def test_ten_thousand_is_an_outlier_and_just_below_is_none() -> None:
    likelihoods_found = [Likelihood(math.log(1e4) + offset, 1) for offset in (1e-6, -1e-6)]
    assert summary(likelihoods_found)["dropped"] == pytest.approx(1 / 2)


def test_the_total_weighs_texts_by_their_tokens() -> None:
    likelihoods_found = [Likelihood(3.0, 1), Likelihood(4.0, 9)]
    assert summary(likelihoods_found)["total_perplexity"] == pytest.approx(math.exp(0.7))


def test_texts_without_a_perplexity_count_as_dropped() -> None:
    figures = summary([*of(10), Likelihood(math.nan, 2), Likelihood(0.0, 0)])
    assert figures["dropped"] == pytest.approx(2 / 3)
    assert figures["perplexity"] == pytest.approx(10)
    assert figures["total_perplexity"] == pytest.approx(10)


def test_no_text_gives_no_figure_and_a_perplexity_beyond_numbers_is_infinite() -> None:
    assert all(math.isnan(value) for value in summary([]).values())
    assert summary([Likelihood(900.0, 1)])["median"] == math.inf


def test_the_judge_reports_the_figures_under_its_name() -> None:
    judge = PerplexityJudge("perplexity:words", gpt2(), "cpu")
    likelihood = flat(gpt2(), ANSWERS)
    scores = judge.scores(ANSWERS)
    assert (judge.name, judge.effect) == ("perplexity:words", None)
    assert scores["perplexity"] == pytest.approx(sum(likelihood) / len(likelihood))
    assert scores["median"] == pytest.approx(sorted(likelihood)[2])


def test_a_text_longer_than_the_judge_reads_is_an_error() -> None:
    text: Any = " good" * 20
    with pytest.raises(SteerError, match="has 22 tokens; the maximum of words is 12; use shorter"):
        likelihoods(gpt2(), [Answers("the hotel", (text,))])
