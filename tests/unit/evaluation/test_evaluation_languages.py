"""Language identification, compared with langdetect itself."""

import pytest

from vllm_steer import SteerError
from vllm_steer.evaluation.answers import Answers
from vllm_steer.evaluation.judges import make_judge
from vllm_steer.evaluation.languages import detect_languages

langdetect = pytest.importorskip("langdetect")

FRENCH = " était très agréable et le petit déjeuner nous a beaucoup plu."
ENGLISH = " was very pleasant and we enjoyed the breakfast a great deal."
UNSURE = " hotel bar via taxi"


def test_the_probability_is_averaged_and_not_the_rate() -> None:
    langdetect.DetectorFactory.seed = 0
    result = {item.lang: item.prob for item in langdetect.detect_langs(UNSURE)}
    code = max(result, key=result.__getitem__)
    assert len(result) > 1  # else the two figures would not differ
    scores = make_judge(f"language:{code}").scores([Answers("Hotel:", (UNSURE, ""))])
    assert scores == pytest.approx({"probability": result[code] / 2, "share": 0.5})


def test_prompts_are_averaged_and_their_text_is_ignored() -> None:
    answers = [Answers(ENGLISH, (FRENCH, FRENCH, FRENCH)), Answers(FRENCH, (ENGLISH,))]
    scores = make_judge("language:fr").scores(answers)
    assert scores == pytest.approx({"probability": 0.5, "share": 0.5}, abs=1e-3)


@pytest.mark.parametrize("text", ["", " ", " 12, 34!"])
def test_a_text_without_letters_is_in_no_language(text: str) -> None:
    scores = make_judge("language:en").scores([Answers("The hotel was", (text,))])
    assert scores == {"probability": 0.0, "share": 0.0}


def test_the_same_text_is_always_the_same_language(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(langdetect.DetectorFactory, "seed", None)  # langdetect's default
    assert len({tuple(detect_languages(UNSURE).items()) for _ in range(20)}) == 1


def test_an_unknown_language_is_an_error_with_the_known_ones() -> None:
    with pytest.raises(
        SteerError, match=r"'french' is not supported by langdetect; supported: af, .*zh-tw"
    ):
        make_judge("language:french")
