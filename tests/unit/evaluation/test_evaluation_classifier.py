"""Text classifiers as judges, compared with forward passes of single texts."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import BertWordPieceTokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertTokenizerFast,
)

from vllm_steer import SteerError
from vllm_steer.evaluation.answers import Answers
from vllm_steer.evaluation.classifier import figures
from vllm_steer.evaluation.judges import JudgeUnavailableError, make_judge

WORDS = ("the", "hotel", "was", "good", "bad", "very", "and", "clean", "loud")
ANSWERS = (
    Answers("the hotel was", (" good", " very bad and loud", " clean and very good and loud")),
    Answers("the", (" hotel", "", " very very very loud and bad")),
    Answers("bad and", (" loud",) * 3),
)
Save = Callable[..., str]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Save a random BERT and its tokenizer; keywords are settings of its config."""

    def make(kind: Any = BertForSequenceClassification, **fields: Any) -> str:
        pieces = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)
        vocab = {piece: folder for folder, piece in enumerate(pieces)}
        BertTokenizerFast(
            tokenizer_object=BertWordPieceTokenizer(vocab)._tokenizer, model_max_length=16
        ).save_pretrained(tmp_path)
        torch.manual_seed(2)  # each label is the likeliest one of some text
        config = BertConfig(
            vocab_size=len(pieces),
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=12,
            max_position_embeddings=16,
            initializer_range=1.0,
            **{"id2label": {0: "NEGATIVE", 1: "POSITIVE", 2: "MIXED"}, **fields},
        )
        kind(config).save_pretrained(tmp_path)
        return str(tmp_path)

    return make


def logits_of(folder: str, text: str) -> list[float]:
    """The logits of one text with Transformers."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        encoded = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
        return list(model(**encoded).logits[0].tolist())


def softmax(row: list[float]) -> list[float]:
    total = sum(map(math.exp, row))
    return [math.exp(value) / total for value in row]


def expected(figures: list[list[list[float]]], label: int) -> dict[str, float]:
    """The figures, from the probabilities of each prompt's texts."""
    shares = [sum(p.index(max(p)) == label for p in texts) / len(texts) for texts in figures]
    mean = sum(shares) / len(shares)
    highest = [max(p[label] for p in texts) for texts in figures]
    return {
        "share": mean,
        "std": math.sqrt(sum((share - mean) ** 2 for share in shares) / len(shares)),
        "probability": sum(sum(p[label] for p in t) / len(t) for t in figures) / len(figures),
        "max": sum(highest) / len(highest),
        "any": sum(value > 0.5 for value in highest) / len(highest),
    }


@pytest.mark.parametrize(
    ("options", "label", "continuation"),
    [("", 1, False), (":NEGATIVE", 0, False), (":MIXED:continuation", 2, True)],
    ids=["default label", "named label", "continuation alone"],
)
def test_each_figure_is_that_of_single_texts(
    save: Save, options: str, label: int, continuation: bool
) -> None:
    folder = save()
    judge = make_judge(f"classifier:{folder}{options}", device="cpu")
    figures = [
        [softmax(logits_of(folder, ("" if continuation else a.prompt) + text)) for text in a.texts]
        for a in ANSWERS
    ]
    expected_figures = expected(figures, label)
    assert judge.scores(ANSWERS) == pytest.approx(expected_figures, rel=1e-4)
    assert 0 < expected_figures["share"] < 1
    assert (judge.name, judge.effect) == (f"classifier:{folder}{options}", "share")


def test_prompts_weigh_the_same_however_many_texts_they_have() -> None:
    probability, verdicts = [[0.9, 0.7, 0.2], [0.1]], [[1.0, 1.0, 0.0], [0.0]]
    scores = figures(probability, verdicts)
    assert scores["share"] == pytest.approx((2 / 3 + 0) / 2)
    assert scores["probability"] == pytest.approx((0.6 + 0.1) / 2)
    assert scores["max"] == pytest.approx((0.9 + 0.1) / 2)
    assert scores["any"] == pytest.approx(1 / 2)
    assert scores["std"] == pytest.approx(1 / 3)


def test_the_maximum_begins_at_zero() -> None:
    scores = figures([[0.8], []], [[1.0], []])
    assert scores["max"] == pytest.approx(0.4)
    assert scores["any"] == pytest.approx(0.5)


def test_a_half_is_not_over_a_half() -> None:
    assert figures([[0.5], [0.501]], [[1.0], [1.0]])["any"] == pytest.approx(0.5)


def test_independent_labels_are_asked_one_by_one(save: Save) -> None:
    folder = save(problem_type="multi_label_classification")
    rows = [[logits_of(folder, a.prompt + text)[2] for text in a.texts] for a in ANSWERS]
    probability = [[1 / (1 + math.exp(-value)) for value in row] for row in rows]
    judge = make_judge(f"classifier:{folder}:MIXED", device="cpu")
    scores = judge.scores(ANSWERS)
    assert scores["probability"] == pytest.approx(sum(sum(p) / 3 for p in probability) / 3)
    assert scores["share"] == pytest.approx(sum(value > 0 for row in rows for value in row) / 9)


def test_a_model_of_one_label_is_asked_for_it(save: Save) -> None:
    folder = save(id2label={0: "TOXIC"})
    value = logits_of(folder, "the hotel")[0]
    judge = make_judge(f"classifier:{folder}", device="cpu")
    scores = judge.scores([Answers("the", (" hotel",))])
    assert scores["probability"] == pytest.approx(1 / (1 + math.exp(-value)))


def test_a_text_longer_than_the_model_reads_is_cut_at_its_end(save: Save) -> None:
    judge = make_judge(f"classifier:{save()}", device="cpu")
    short, long = (
        judge.scores([Answers("the hotel was", (" good" * count,))]) for count in (11, 40)
    )
    assert long == short  # 16 tokens, two of them [CLS] and [SEP]


def test_an_unknown_label_is_an_error_with_the_labels(save: Save) -> None:
    with pytest.raises(SteerError, match="no label 'GOOD'; its labels: NEGATIVE, POSITIVE, MIXED"):
        make_judge(f"classifier:{save()}:GOOD")


def test_a_regression_model_is_an_error(save: Save) -> None:
    folder = save(problem_type="regression", id2label={0: "SCORE"})
    with pytest.raises(SteerError, match="has no labels: it is a regression model"):
        make_judge(f"classifier:{folder}")


def test_a_model_without_a_trained_head_is_no_judge(save: Save) -> None:
    folder = save(BertForMaskedLM)
    with pytest.raises(
        JudgeUnavailableError, match=r"is not a text classifier: .*classifier\.bias"
    ):
        make_judge(f"classifier:{folder}")
