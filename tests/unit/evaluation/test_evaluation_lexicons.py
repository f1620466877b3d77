"""Word lists as judges, compared with counts by hand."""

import json
from pathlib import Path

import pytest

from vllm_steer import SteerError
from vllm_steer.evaluation.answers import Answers
from vllm_steer.evaluation.judges import make_judge


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "mood.yaml"
    path.write_text("positive: [glad, Happy, 'no']\nnegative: [sad, ill-tempered]\n")
    return path


def share(path: Path, *texts: str) -> float:
    return make_judge(f"lexicon:{path}").scores([Answers("A sad start:", texts)])["share"]


def test_the_majority_of_the_telling_words_decides(words: Path) -> None:
    assert share(words, " glad, glad and sad.") == 1
    assert share(words, " sad, ill-tempered, glad") == 0


def test_a_tie_and_a_text_without_telling_words_count_one_half(words: Path) -> None:
    texts = (" glad but sad", " a table")
    scores = make_judge(f"lexicon:{words}").scores([Answers("p", (*texts, " glad", " HAPPY"))])
    assert scores == {"share": 0.75, "undecided": 0.5}


def test_words_are_whole_and_case_does_not_matter(words: Path) -> None:
    assert share(words, " Sadly nothing") == 0.5
    assert share(words, " Ill-Tempered") == 0
    assert share(words, " HAPPY") == 1


def test_prompts_weigh_the_same(words: Path) -> None:
    answers = [Answers("p", (" glad",) * 3), Answers("q", (" sad",))]
    assert make_judge(f"lexicon:{words}").scores(answers)["share"] == 0.5


def test_json_says_the_same_as_yaml(tmp_path: Path, words: Path) -> None:
    path = tmp_path / "mood.json"
    path.write_text(json.dumps({"positive": ["glad"], "negative": ["sad"]}))
    assert share(path, " so glad", " so sad", " sad") == share(words, " so glad", " so sad", " sad")


@pytest.mark.parametrize(
    ("spec", "text", "opposite"),
    [
        ("sentiment", " The breakfast was wonderful.", " The breakfast was awful."),
        ("formality", " We are most grateful, indeed.", " It's kinda cool, gonna tell my mates."),
    ],
)
def test_the_embedded_lexicon_classifies_a_text(spec: str, text: str, opposite: str) -> None:
    from vllm_steer.embedded import lexicon

    judge = make_judge(f"lexicon:embedded:{spec}")
    of = getattr(lexicon, spec)
    answers = [Answers("The hotel was", (text, opposite, " "))]
    assert judge.scores(answers)["share"] == pytest.approx((of(text) + of(opposite) + 0.5) / 3)
    assert judge.effect == "share"


def test_a_text_of_no_one_language_is_not_in_the_language() -> None:
    judge = make_judge("lexicon:embedded:language=fr")
    scores = judge.scores([Answers("p", (" L'hôtel était très propre.", " The food was", ""))])
    assert scores == pytest.approx({"share": 1 / 3, "undecided": 1 / 3})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("positive: [glad]", "expected two lists, named positive and negative"),
        ("- glad", "expected two lists, named positive and negative"),
        ("{positive: [glad], negative: []}", r"negative is \[\]; expected a list of words"),
        ("{positive: [no], negative: [sad]}", "positive has False; expected a single word"),
        (
            "{positive: [very glad], negative: [sad]}",
            "positive has 'very glad'; expected a single word",
        ),
        ("{positive: [glad, sad], negative: [Sad]}", "sad in both lists; give each word once"),
        ("{positive: [", "is neither YAML nor JSON"),
    ],
)
def test_a_lexicon_of_another_shape_is_an_error(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mood.yaml"
    path.write_text(content)
    with pytest.raises(SteerError, match=message):
        make_judge(f"lexicon:{path}")


def test_a_large_lexicon_and_one_of_many_aliases_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mood.yaml"
    path.write_text("positive: [" + "a, " * 200_000 + "a]\nnegative: [b]\n")
    with pytest.raises(SteerError, match=r"mood\.yaml is larger than [0-9]+ bytes"):
        make_judge(f"lexicon:{path}")
    lines = ["x0: &x0 [a, a]", *(f"x{i}: &x{i} [*x{i - 1}, *x{i - 1}]" for i in range(1, 60))]
    path.write_text("\n".join(lines) + "\npositive: *x59\nnegative: [b]\n")
    with pytest.raises(SteerError, match=r"more than [0-9]+ values"):
        make_judge(f"lexicon:{path}")


def test_a_missing_lexicon_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match=r"mood\.yaml: no such file"):
        make_judge(f"lexicon:{tmp_path / 'mood.yaml'}")
    with pytest.raises(SteerError, match=r"mood\.txt: expected a \.yaml, \.yml or \.json file"):
        make_judge(f"lexicon:{tmp_path / 'mood.txt'}")


@pytest.mark.parametrize("lexicon", ["mood", "", "language=it"])
def test_an_unknown_embedded_lexicon_is_an_error(lexicon: str) -> None:
    with pytest.raises(SteerError, match="is unknown; available: sentiment, formality, language="):
        make_judge(f"lexicon:embedded:{lexicon}")
