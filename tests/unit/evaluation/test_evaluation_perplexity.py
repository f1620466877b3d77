"""Conditional perplexity, compared with the mean loss of single texts in float64."""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from outside import STORIES, needs
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from vllm_steer import SteerError
from vllm_steer.evaluation import perplexity
from vllm_steer.evaluation.answers import Answers
from vllm_steer.evaluation.judges import make_judge
from vllm_steer.evaluation.perplexity import Likelihood, PerplexityJudge, likelihoods, summary
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


@pytest.mark.parametrize("at_once", [1 << 25, 1], ids=["one batch", "one by one"])
def test_perplexity_is_conditional_on_the_prompt(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexity, "_LOGITS", at_once)
    likelihoods_found = [likelihood.perplexity for likelihood in likelihoods(gpt2(), ANSWERS)]
    assert likelihoods_found == pytest.approx(flat(gpt2(), ANSWERS), rel=1e-9)


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
