"""The embedded model responds to its steers: LM-Steers in a generation loop of this test, vectors
and deltas in Hugging Face's `generate`.
"""

import itertools
import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import measure
import pytest
import torch
from fit_steers import NAMES
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_steer import LMSteer, SteerConfig, load_steer
from vllm_steer.embedded import MODEL, STEER_CONFIG, STEERS, corpus, lexicon
from vllm_steer.plan import SteerPlan

SAMPLES_PER_PROMPT = 20
NEW_TOKENS = 24
STRENGTHS = (-5.0, -2.5, 0.0, 2.5, 5.0)
STEER_NAMES = ("sentiment", "formality", "french", "german", "spanish")
LANGUAGE_OF = {"french": "fr", "german": "de", "spanish": "es"}
GUIDED_LANGUAGE_OF = {
    "french-vector": "fr",
    "german-vector": "de",
    "french-delta": "fr",
    "german-delta": "de",
}


@cache
def embedded_model() -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)


def steered_hidden_states(
    hidden_states: torch.Tensor, steer: LMSteer, strength: float
) -> torch.Tensor:
    """h (I + epsilon sum_s a_s P1_s P2_s^T), a_s the strength or 1 for a fixed column."""
    if strength == 0:
        return hidden_states
    matrix = torch.zeros(steer.hidden_size, steer.hidden_size)
    for column in range(steer.columns):
        amount = 1.0 if column in steer.fixed_columns else strength
        matrix += amount * steer.projector1[column] @ steer.projector2[column].T
    return hidden_states + steer.epsilon * hidden_states @ matrix


@torch.no_grad()
def continuations(prompts: Sequence[str], steer: LMSteer, strength: float) -> list[str]:
    """`SAMPLES_PER_PROMPT` texts for each prompt, sampled at temperature 1 with a fixed seed."""
    model, tokenizer = embedded_model()
    generator = torch.Generator().manual_seed(0)
    encoded = sorted((tokenizer(prompt)["input_ids"] for prompt in prompts), key=len)
    texts = []
    for _, same_length in itertools.groupby(encoded, key=len):
        tokens = torch.tensor(list(same_length)).repeat_interleave(SAMPLES_PER_PROMPT, dim=0)
        cache, generated = None, []
        for _ in range(NEW_TOKENS):
            output = model.model(input_ids=tokens, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            last = steered_hidden_states(output.last_hidden_state[:, -1], steer, strength)
            probabilities = torch.softmax(model.lm_head(last), dim=-1)
            tokens = torch.multinomial(probabilities, 1, generator=generator)
            generated.append(tokens)
        texts += [until_the_end(row) for row in torch.cat(generated, dim=1).tolist()]
    return texts


def until_the_end(row: list[int]) -> str:
    _, tokenizer = embedded_model()
    end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
    return str(tokenizer.decode(row[:end]))


@cache
def texts_of(name: str, strength: float) -> list[str]:
    steer = load_steer(STEERS / f"{name}.safetensors")
    prompts = corpus.OPEN_PROMPTS if name in LANGUAGE_OF else corpus.NEUTRAL_PROMPTS
    return continuations(prompts, steer, strength)


def formal_share(texts: Sequence[str]) -> float:
    return sum(map(lexicon.formality, texts)) / len(texts)


def language_share(texts: Sequence[str], code: str) -> float:
    return sum(lexicon.language(text) == code for text in texts) / len(texts)


def test_positive_share_follows_the_strength() -> None:
    shares = [lexicon.positive_share(texts_of("sentiment", strength)) for strength in STRENGTHS]
    assert shares[0] <= 0.2
    assert shares[2] == pytest.approx(0.5, abs=0.15)
    assert shares[4] >= 0.8
    # Where a share is as good as 0 or 1, chance decides between neighbours.
    assert all(right > remaining - 0.03 for remaining, right in itertools.pairwise(shares))


def test_formal_share_follows_the_strength() -> None:
    shares = [formal_share(texts_of("formality", strength)) for strength in (-5.0, 0.0, 5.0)]
    assert shares[0] <= 0.2
    assert shares[1] == pytest.approx(0.5, abs=0.15)
    assert shares[2] >= 0.8


@pytest.mark.parametrize("name", LANGUAGE_OF)
def test_language_share_rises_with_the_strength(name: str) -> None:
    shares = [language_share(texts_of(name, v), LANGUAGE_OF[name]) for v in (-5.0, 0.0, 5.0)]
    assert shares[0] <= 0.05
    assert 0.05 <= shares[1] <= 0.4
    assert shares[2] >= 0.8


@pytest.mark.parametrize("strength", [-5.0, 5.0])
def test_steered_text_is_as_varied_as_unsteered_text(strength: float) -> None:
    unsteered = lexicon.distinct_n(texts_of("sentiment", 0.0), 2)
    steered = lexicon.distinct_n(texts_of("sentiment", strength), 2)
    assert steered == pytest.approx(unsteered, rel=0.15)


@cache
def plan() -> SteerPlan:
    return SteerPlan.of(SteerConfig.load(STEER_CONFIG))


@cache
def _guided(setting: str, samples: int) -> tuple[str, ...]:
    model, tokenizer = embedded_model()
    steers = measure.embedded_steers()
    return tuple(measure.sample(model, tokenizer, json.loads(setting), steers, samples=samples))


def guided(strengths: measure.Strengths, samples: int = 16) -> tuple[str, ...]:
    """Texts after the open prompts; each setting is sampled once."""
    return _guided(json.dumps(strengths), samples)


def at_default(name: str) -> dict[str, float]:
    return {name: plan().steers[name].default_strength}


@pytest.mark.parametrize("name", GUIDED_LANGUAGE_OF)
def test_guidance_leads_to_its_language_in_words_that_exist(name: str) -> None:
    texts = guided(at_default(name))
    code = GUIDED_LANGUAGE_OF[name]
    assert language_share(guided({}), code) <= 0.3
    assert language_share(texts, code) >= 0.8
    assert lexicon.known_share(texts) >= 0.88


@pytest.mark.parametrize("name", ["french-vector", "french-delta", "german-delta"])
def test_guided_text_is_as_varied_as_unsteered_text(name: str) -> None:
    unsteered = lexicon.distinct_n(guided({}), 2)
    assert lexicon.distinct_n(guided(at_default(name)), 2) == pytest.approx(unsteered, rel=0.15)


@pytest.mark.parametrize("name", GUIDED_LANGUAGE_OF)
def test_guided_text_repeats_itself_no_more_than_unsteered_text_of_its_language(name: str) -> None:
    # Text of one language is less varied than unsteered text, a mix of four languages.
    code = GUIDED_LANGUAGE_OF[name]
    unsteered = [text for text in guided({}, samples=80) if lexicon.language(text) == code]
    assert len(unsteered) >= 100
    assert lexicon.distinct_n(guided(at_default(name)), 2) >= 0.85 * lexicon.distinct_n(
        unsteered, 2
    )


@pytest.mark.parametrize("name", ["formality-vector", "formality-shift"])
def test_guided_formality_follows_the_sign_of_the_strength(name: str) -> None:
    (strength,) = at_default(name).values()
    assert formal_share(guided({name: -strength})) <= 0.3
    assert formal_share(guided({name: strength})) >= 0.7


@cache
def guided_english(strength: float) -> tuple[str, ...]:
    model, tokenizer = embedded_model()
    steers, strengths = measure.embedded_steers(), {"sentiment-vector": strength}
    prompts = corpus.NEUTRAL_PROMPTS
    return tuple(measure.sample(model, tokenizer, strengths, steers, prompts=prompts, samples=20))


def test_guided_sentiment_follows_the_sign_of_the_strength_in_english() -> None:
    (strength,) = at_default("sentiment-vector").values()
    negative, neutral, positive = (
        lexicon.positive_share(guided_english(v)) for v in (-strength, 0.0, strength)
    )
    assert negative <= neutral - 0.1
    assert positive >= neutral + 0.1
    assert negative <= 0.38 and positive >= 0.6
    assert lexicon.known_share(guided_english(strength)) >= 0.87


@pytest.mark.parametrize("name", ["french-vector", "french-delta"])
@pytest.mark.parametrize("sentiment", [-5.0, 5.0])
def test_language_and_sentiment_are_steered_together(name: str, sentiment: float) -> None:
    texts = guided(at_default(name) | {"sentiment": sentiment})
    positive = lexicon.positive_share(texts)
    assert language_share(texts, "fr") >= 0.8
    assert positive >= 0.7 if sentiment > 0 else positive <= 0.3


def test_a_vector_a_delta_and_an_lm_steer_act_together() -> None:
    (strengths,) = (mix for name, mix in plan().presets.items() if name == "french-thanks")
    texts = guided(strengths)
    assert language_share(texts, "fr") >= 0.8
    assert lexicon.positive_share(texts) >= 0.65
    assert formal_share(texts) >= 0.65


@pytest.mark.parametrize("schedule", ["start", "dim"])
def test_a_delta_leads_to_its_language_by_every_schedule(schedule: str) -> None:
    texts = guided({"french-delta": {"strength": 2.0, "schedule": schedule}})
    assert language_share(texts, "fr") >= 0.65


def test_a_vector_on_the_prompt_alone_leaves_the_answer_to_the_model() -> None:
    texts = guided({"french-vector": {"strength": 5.0, "phase": "prompt"}})
    assert lexicon.known_share(texts) >= 0.95


def test_lexicon_classifies_held_out_samples_exactly() -> None:
    for sample in corpus.generate(2_000, seed=77):
        assert lexicon.language(sample.text) == sample.language
        assert lexicon.sentiment(sample.text) == float(sample.sentiment == "positive")
        assert lexicon.formality(sample.text) == float(sample.formality == "formal")


@pytest.mark.parametrize("language", corpus.LANGUAGES)
def test_labels_given_to_the_corpus_are_kept(language: str) -> None:
    samples = corpus.generate(
        50, seed=3, language=language, sentiment="negative", formality="formal"
    )
    labels = {(sample.language, sample.sentiment, sample.formality) for sample in samples}
    assert labels == {(language, "negative", "formal")}


def test_corpus_is_the_same_for_the_same_seed() -> None:
    assert corpus.generate(100, seed=1) == corpus.generate(100, seed=1)
    assert corpus.generate(100, seed=1) != corpus.generate(100, seed=2)
    assert corpus.bilingual(20, seed=1) == corpus.bilingual(20, seed=1)


def test_bilingual_samples_hold_both_languages() -> None:
    samples = corpus.bilingual(100, seed=1, first="en", second="fr")
    owners = {lexicon.language(part) for s in samples for part in s.text.split(". ")}
    assert {"en", "fr"} <= owners <= {"en", "fr", None}
    assert {sample.language for sample in samples} == {"fr"}


def test_neutral_prompts_carry_no_evidence() -> None:
    for prompt in (*corpus.NEUTRAL_PROMPTS, *corpus.OPEN_PROMPTS):
        assert lexicon.sentiment(prompt) == lexicon.formality(prompt) == 0.5


def test_a_word_cut_short_is_no_evidence() -> None:
    assert lexicon.sentiment("The flat was worth") == 0.5
    assert lexicon.sentiment("The flat was worthless") == 0.0
    assert lexicon.sentiment("The flat was wonderf\ufffd") == 0.5


def test_texts_without_evidence_count_one_half() -> None:
    assert lexicon.positive_share(["", "The hotel was wonderful."]) == 0.75
    assert lexicon.language("") is None


def test_distinct_n_pools_the_texts() -> None:
    assert lexicon.distinct_n(["a b a b", "a b"], 2) == 2 / 4
    assert lexicon.distinct_n(["a b a b", "a b"], 1) == 2 / 6
    assert lexicon.distinct_n(["a"], 2) == 0.0


def test_known_share_counts_words_of_the_grammar() -> None:
    assert lexicon.known_share(["The hotel wasissful. The shower"]) == 3 / 4
    assert lexicon.known_share(["", "The"]) == 1.0
    assert lexicon.known_share(s.text for s in corpus.generate(500, seed=5)) == 1.0


def test_model_folder_is_at_most_five_megabytes() -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 5_000_000


def test_tokenizer_begins_with_bos_and_joins_chat_messages() -> None:
    _, tokenizer = embedded_model()
    plain = tokenizer("The hotel was great")["input_ids"]
    assert plain[0] == tokenizer.bos_token_id
    messages = [{"role": "user", "content": "The hotel"}, {"role": "user", "content": "was great"}]
    assert tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"] == plain
    accents = "Größe, œuvre, ¿niño?"
    assert tokenizer.decode(tokenizer(accents)["input_ids"], skip_special_tokens=True) == accents


@pytest.mark.parametrize("name", STEER_NAMES)
def test_steer_files_load_and_fit_the_model(name: str) -> None:
    model, _ = embedded_model()
    steer = load_steer(STEERS / f"{name}.safetensors")
    assert steer.hidden_size == model.config.hidden_size
    assert steer.fixed_columns == (1,)
    assert steer.description


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(STEER_NAMES)))
def test_guidance_files_are_small_and_fit_the_model(name: str) -> None:
    model, _ = embedded_model()
    steer = load_steer(STEERS / f"{name}.safetensors")
    assert steer.hidden_size == model.config.hidden_size
    assert max(steer.layers or ()) < model.config.num_hidden_layers
    assert steer.description
    assert (STEERS / f"{name}.safetensors").stat().st_size <= 200_000


def test_the_config_names_every_steer_that_is_fitted() -> None:
    files = {path.stem for path in STEERS.glob("*.safetensors")}
    assert set(NAMES) == set(plan().steers) == files
