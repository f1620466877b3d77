"""The experiments on sentiment: detokenised text, parts of the data, judges, tables."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.real_model import sentiment
from benchmarks.real_model.concept_guidance import conversations
from benchmarks.real_model.concept_guidance_table import concept_guidance_tables
from benchmarks.real_model.lm_steer import is_french
from benchmarks.real_model.lm_steer_table import lm_steer_tables
from benchmarks.real_model.sentiment_run import examples
from vllm_steer import SteerError
from vllm_steer.evaluation import Answers
from vllm_steer.evaluation.scores import figures_with_errors
from vllm_steer.texts import LabelledText


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ("It does n't work , and that 's it .", "It doesn't work, and that's it."),
        ("`` Conan '' ( the first ) costs $ 9 !", '"Conan" (the first) costs $9!'),
        ("The boys ' toys ... are n't ` new ' ?", "The boys' toys... aren't 'new'?"),
        ("well-made -- and a '70s film", "well-made -- and a '70s film"),
    ],
)
def test_sentences_are_detokenised(tokens: str, text: str) -> None:
    assert sentiment.detokenise(tokens) == text


def test_the_parts_of_the_data_are_those_of_the_line_numbers(tmp_path: Path) -> None:
    file = tmp_path / "train.txt"
    lines = [f"__label__{n % 5 + 1}\tline {n} ." for n in range(40)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    parts = sentiment.read_sst(file)
    assert [s.text for s in parts.held_out] == ["line 19.", "line 39."]
    assert [s.text for s in parts.judge] == [f"line {n}." for n in (3, 7, 11, 15, 23, 27, 31, 35)]
    assert len(parts.steer) == 30
    assert parts.steer[:3] == [("line 0.", -1.0), ("line 1.", -0.5), ("line 2.", 0.0)]


def test_a_line_of_another_form_is_named(tmp_path: Path) -> None:
    file = tmp_path / "train.txt"
    file.write_text("__label__1\tgood\n__label__6\tbad\n", encoding="utf-8")
    with pytest.raises(SteerError, match=r"train\.txt:2: label '6'"):
        sentiment.read_sst(file)


def test_sides_take_turns_and_neutral_sentences_are_left_out() -> None:
    given = [LabelledText(*pair) for pair in (("a", 1.0), ("b", 0.0), ("c", 0.5), ("d", -1.0))]
    assert [s.text for s in sentiment.balanced(given, 5)] == ["d", "a"]
    assert sentiment.balanced(given, 1) == [("d", -1.0)]


@pytest.mark.parametrize(
    ("score", "verdict"), [(0.06, 1.0), (0.05, None), (0.0, None), (-0.05, None), (-0.06, 0.0)]
)
def test_the_thresholds_of_a_compound_score(score: float, verdict: float | None) -> None:
    assert sentiment.verdict_of(score) == verdict


def test_vader_reads_plain_cases() -> None:
    verdict = sentiment.vader()
    texts = ("I love this wonderful film.", "A terrible, awful film.", "The table has four legs.")
    assert [verdict(text) for text in texts] == [1.0, 0.0, None]


def test_shares_and_their_errors_over_prompts() -> None:
    verdicts = {"good": 1.0, "bad": 0.0, "none": None}
    judge = sentiment.VerdictJudge("judge", verdicts.__getitem__)
    answers = [Answers("a", ("good", "good")), Answers("b", ("bad", "none"))]
    scores = figures_with_errors(judge, [*answers, Answers("c", ("good", "none"))])
    # Positive: 1, 0 and 1/2 by prompt; the error of their mean is sqrt(0.25 / 3).
    assert scores["positive"] == pytest.approx(0.5)
    assert scores["positive_error"] == pytest.approx(math.sqrt(0.25 / 3))
    # Negative: 0, 1/2 and 0: variance 1/12.
    assert scores["negative"] == pytest.approx(1 / 6)
    assert scores["negative_error"] == pytest.approx(math.sqrt(1 / 36))
    assert scores["undecided"] == pytest.approx(1 / 3)


def test_perplexity_is_of_all_tokens_and_likelihoods_are_read_from_the_file(tmp_path: Path) -> None:
    file = tmp_path / "likelihoods.json"
    nll = 2 * math.log(4)
    file.write_text(f'{{"a\\u0000 x": [{nll}, 2], "b\\u0000 y": [{3 * nll}, 4]}}', "utf-8")
    judge = sentiment.StoredPerplexity("perplexity", lambda: pytest.fail("no model"), file)
    scores = figures_with_errors(judge, [Answers("a", (" x",)), Answers("b", (" y",))])
    # By text 4 and 4^(3/2) = 8; over all tokens 4^(8/6).
    assert scores["perplexity"] == pytest.approx(6)
    assert scores["perplexity_error"] == pytest.approx(2)
    assert scores["median"] == pytest.approx(6)
    assert scores["total_perplexity"] == pytest.approx(4 ** (4 / 3))


def test_french_is_recognised() -> None:
    assert is_french("Le personnel de cet hôtel était vraiment très aimable avec nous.") == 1.0
    assert is_french("The staff of this hotel was really very kind to all of us.") == 0.0
    assert is_french("12 34") == 0.0


def test_every_answer_has_a_prompt_of_its_own() -> None:
    made = conversations([LabelledText("good", 1.0), LabelledText("bad", -0.5)])
    assert [one.label for one in made] == [1, 0]
    assert [one.messages[-1]["content"] for one in made] == ["good", "bad"]
    assert len({one.prompt for one in made}) == 2


def test_examples_are_of_the_third_and_fourth_prompt(tmp_path: Path) -> None:
    (tmp_path / "generations").mkdir()
    rows = [
        {"prompt": {"text": f"p{n}"}, "generations": [{"text": f"t{n}"}, {"text": "other"}]}
        for n in range(5)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "generations" / "none.jsonl").write_text(lines, encoding="utf-8")
    assert list(examples(tmp_path, ["none"])) == [
        {"condition": "none", "prompt": "p2", "text": "t2"},
        {"condition": "none", "prompt": "p3", "text": "t3"},
    ]


def judged(positive: float, perplexity: float) -> dict[str, Any]:
    shares = {"positive": positive, "positive_error": 0.05}
    shares |= {"negative": 1 - positive, "negative_error": 0.02}
    return {
        "vader": shares,
        "classifier": shares,
        "language": shares,
        "french_words": shares,
        "perplexity": {"perplexity": perplexity, "perplexity_error": 2.4},
        "diversity": {"dist-1": 0.5, "dist-2": 0.75, "dist-3": 0.8},
    }


def condition(steer: str, strength: float, positive: float, **facts: Any) -> dict[str, Any]:
    return {**facts, "steer": steer, "strength": strength, **judged(positive, 20.0)}


HEAD: dict[str, Any] = {
    "model": "small",
    "machine": {"gpu": None, "cpu": "a CPU", "cores": 2, "load_average": [1.0]},
    "versions": {"vllm": "1", "torch": "2", "triton": None},
    "date": "2026-01-02T03:04:05",
    "git": {"commit": "0123456789abcdef", "dirty": False},
    "command": "python -m it",
    "prompts": 3,
    "sampling": {"samples": 2, "max_tokens": 20},
    "seconds": {"one": 60.0, "two": 59.0},
    "rank": 64,
}
PNES = {"vader": {"steer": {"pnes": 0.5, "r2": 0.9}, "random": "no curve"}}


def test_the_tables_of_lm_steer() -> None:
    part = {"part": "strengths", "rank": 64}
    transferred = {"part": "transfer", "rank": 64}
    data = HEAD | {
        "pnes": PNES,
        "words": [{"highest": [" good", "a|b"], "lowest": [" bad"]}],
        "evidence": [{"label": -0.5, "total": -1.234, "span": "a bad film"}],
        "effect": {"texts": 60.0, "accuracy": 0.75},
        "rows": [
            condition("none", 0.0, 0.4, **part),
            condition("random", 5.0, 0.42, **part),
            condition("steer", 5.0, 0.9, **part),
            condition("steer", 5.0, 0.8, part="ranks", rank=16),
            {"part": "french", "steers": "fr+up", **judged(0.7, 30.0)},
            condition("steer", 2.0, 0.6, **transferred),
        ],
    }
    lines = lm_steer_tables(data).splitlines()
    assert lines[0] == "**small, a CPU, 2 cores, vllm 1, torch 2, 2026-01-02**"
    for row in (
        "| 0 | 40 ± 5 | 40 ± 5 | 40 ± 5 | 40 ± 5 |",
        "| 5 | 90 ± 5 | 42 ± 5 | 90 ± 5 | 42 ± 5 |",
        "| 5 | 20 ± 2 | 20 ± 2 | 0.50 / 0.75 / 0.80 |",
        "| rank 64 | vader | 0.50 (0.90) | none |",
        "| neutral to positive | 41.2 | 20 ± 2 | 0.50 / 0.75 / 0.80 |",
        "| neutral to negative | 57.74 | - | - |",
        "| 16 | 5 | steer | 80 ± 5 | 80 ± 5 | 20 ± 2 |",
        "| 1 | good, a\\|b | bad |",
        "| -0.5 | -1.23 | a bad film |",
        "Of 60 held-out sentences 75 % are on the side of their label.",
        "| fr+up | 70 ± 5 | 70 ± 5 | 30 ± 2 | 70 ± 5 | 30 ± 2 |",
        "| 2 | 60 ± 5 | - | 60 ± 5 | - |",
        "3 prompts, 2 texts of 20 tokens each; 2 minutes.",
    ):
        assert row in lines
    assert lines[-1].startswith("`python -m it`, commit 0123456789ab,")


def test_a_part_that_did_not_run_has_no_table() -> None:
    for make in (lm_steer_tables, concept_guidance_tables):
        assert "|" not in make(HEAD | {"rows": []})


def test_the_tables_of_concept_guidance() -> None:
    half = {"part": "probes", "probe": "dim", "layers": 9}
    data = HEAD | {
        "accuracy": {"dim": {"validation": [0.5, 0.61]}, "pca": {"validation": [0.52, 0.53]}},
        "norms": [11.2, 29.8],
        "pnes": {"dim": PNES},
        "rows": [
            condition("none", 0.0, 0.4, **half),
            condition("steer", 32.0, 0.9, **half),
            condition("steer", 64.0, 0.95, **half),
            condition("steer", 32.0, 0.7, part="layers", probe="dim", layers=4),
            condition("none", 0.0, 0.4, part="layers", probe="dim", layers=4),
        ],
    }
    lines = concept_guidance_tables(data).splitlines()
    for row in (
        "| layer | dim | pca | length |",
        "| 1 | 0.61 | 0.53 | 30 |",
        "| 64 | 95 ± 5 | - | 95 ± 5 | - |",
        "| dim | vader | 0.50 (0.90) | none |",
        "| 4 | 32 | steer | 70 ± 5 | 70 ± 5 | 20 ± 2 |",
        "| 9 | 32 | steer | 90 ± 5 | 90 ± 5 | 20 ± 2 |",
    ):
        assert row in lines
    # Only the scales of the part "layers" are in its table.
    assert not any(line.startswith("| 9 | 64") for line in lines)
