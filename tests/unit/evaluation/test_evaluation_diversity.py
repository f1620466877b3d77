"""Distinct n-grams, repetition and compression, compared with counts by hand."""

import math
import zlib

import pytest

from vllm_steer.evaluation.answers import Answers
from vllm_steer.evaluation.diversity import DiversityJudge, RepetitionJudge, compression, repeated

diversity, repetition = DiversityJudge("diversity"), RepetitionJudge("repetition")


def test_a_leading_space_makes_an_empty_word() -> None:
    # "", a, b | "", a, c: 6 words, of which "", a, b, c differ.
    scores = diversity.scores([Answers("p", (" a b", " a c"))])
    assert scores["dist-1"] == pytest.approx(4 / 6)


def test_words_divide_for_every_n() -> None:
    # Bigrams "" a, a b, a c differ of 4; trigrams "" a b, "" a c of 2; words 6.
    scores = diversity.scores([Answers("p", (" a b", " a c"))])
    assert scores["dist-2"] == pytest.approx(3 / 6)
    assert scores["dist-3"] == pytest.approx(2 / 6)


def test_no_n_gram_crosses_from_a_text_into_the_next() -> None:
    assert diversity.scores([Answers("p", ("a b", "c d"))])["dist-2"] == pytest.approx(2 / 4)


def test_texts_are_pooled_by_prompt_and_prompts_are_averaged() -> None:
    answers = [Answers("p", ("a", "a")), Answers("q", ("a", "b"))]
    assert diversity.scores(answers)["dist-1"] == pytest.approx((1 / 2 + 2 / 2) / 2)


def test_a_prompt_without_texts_is_left_out() -> None:
    answers = [Answers("p", ()), Answers("q", ("a", "a"))]
    assert diversity.scores(answers)["dist-1"] == pytest.approx(1 / 2)
    assert math.isnan(diversity.scores([Answers("p", ())])["dist-1"])


def test_repeated_four_grams_are_counted_within_a_text() -> None:
    # a b a b a b a: abab, baba, abab, baba: two of four differ.
    assert repeated("a b a b a b a", 4) == pytest.approx(0.5)
    answers = [Answers("p", (" a b a b a b a", " a b c d", "too short"))]
    assert repetition.scores(answers)["rep-4"] == pytest.approx((0.5 + 0) / 2)


def test_compression_is_text_over_compressed_bytes() -> None:
    texts = (" déjà vu" * 9, " again")
    raw = (" déjà vu" * 9 + "\n again").encode("utf-8")
    assert len(raw) == 9 * 10 + 7
    expected = len(raw) / len(zlib.compress(raw, 9))
    assert compression(texts) == expected
    assert repetition.scores([Answers("p", texts)])["compression"] == expected


def test_repetitive_texts_compress_better() -> None:
    assert compression(["good good good good good"] * 5) > compression(["one two", "three four"])


def test_texts_that_are_too_short_have_no_repetition() -> None:
    scores = repetition.scores([Answers("p", ("", ""))])
    assert math.isnan(scores["rep-4"])


def test_fluency_judges_have_no_effect() -> None:
    assert diversity.effect is None
    assert repetition.effect is None
