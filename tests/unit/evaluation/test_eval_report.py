"""The report of an evaluation: figures, the unsteered model and the control, valid JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vllm_steer import SteerError
from vllm_steer.cli.terminal import Console
from vllm_steer.evaluation.answers import Answers
from vllm_steer.evaluation.json_files import as_json
from vllm_steer.evaluation.lexicons import LexiconJudge
from vllm_steer.evaluation.plot import draw_report
from vllm_steer.evaluation.report import EvaluationReport, JudgeEntry, make_report, markdown, tables
from vllm_steer.evaluation.run import Condition, condition_grid, open_run
from vllm_steer.evaluation.scores import score

ABOUT: dict[str, Any] = {
    "model": "m",
    "steer": {"file": "s.safetensors"},
    "prompts": {"file": "p.txt", "count": 1},
    "sampling": {"samples": 2},
}
STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0)
LEXICON, PERPLEXITY = JudgeEntry("lexicon:mine", "share"), JudgeEntry("perplexity:m", None)


@dataclass(frozen=True)
class Letters:
    """A fake judge: the share of texts with a letter."""

    letter: str
    effect: str | None = "share"

    @property
    def name(self) -> str:
        return f"letters:{self.letter}"

    def scores(self, answers: Sequence[Answers]) -> Mapping[str, float]:
        texts = [text for answer in answers for text in answer.texts]
        return {"share": sum(self.letter in text for text in texts) / len(texts)}


def report(effect: Any, perplexity: Any, judges: Any = (LEXICON, PERPLEXITY)) -> EvaluationReport:
    """A report whose figures are functions of the steer and the strength."""
    settings = condition_grid(STRENGTHS)
    scores = {
        LEXICON.name: {s.name: {"share": effect(s)} for s in settings},
        PERPLEXITY.name: {s.name: {"total_perplexity": perplexity(s)} for s in settings},
    }
    remaining = {judge.name: scores[judge.name] for judge in judges}
    return make_report(ABOUT, settings, judges, remaining, {"perspective": "no service"})


def rising(setting: Condition) -> float:
    return 0.5 + 0.2 * setting.strength if setting.steer == "steer" else 0.5


def test_each_setting_is_scored_by_each_judge(tmp_path: Path) -> None:
    run, settings = open_run(tmp_path, ABOUT), condition_grid((0.0, 1.0))
    texts = {"none": "ab", "steer+1": "aa", "random+1": "bb"}
    for setting in settings:
        run.write(setting, [Answers("p", tuple(texts[setting.name]))])
    calls: list[tuple[int, str]] = []
    scores = score(
        run,
        settings,
        [Letters("a"), Letters("b")],
        on_text=lambda n, judge: calls.append((n, judge)),
    )
    assert {name: figures["share"] for name, figures in scores["letters:a"].items()} == {
        "none": 0.5,
        "steer+1": 1.0,
        "random+1": 0.0,
    }
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    # Before and after the two texts of each setting.
    a, b = ([n for n, judge in calls if judge == f"letters:{letter}"] for letter in "ab")
    assert (a, b) == ([0, 2, 2, 4, 4, 6], [6, 8, 8, 10, 10, 12])


def test_the_report_has_every_part() -> None:
    data = report(rising, lambda s: 4.0).data
    assert data["judges"] == [
        {"name": "lexicon:mine", "effect": "share"},
        {"name": "perplexity:m", "effect": None},
    ]
    assert data["not_at_hand"] == {"perspective": "no service"}
    assert [(s["steer"], s["strength"]) for s in data["settings"]] == [
        ("none", 0.0),
        *(("steer", v) for v in (-2, -1, 1, 2)),
        *(("random", v) for v in (-2, -1, 1, 2)),
    ]
    assert data["settings"][4]["figures"] == {
        "lexicon:mine": {"share": pytest.approx(0.9)},
        "perplexity:m": {"total_perplexity": 4.0},
    }


def test_strength_zero_is_the_unsteered_model_for_steer_and_control() -> None:
    result = report(rising, lambda s: 7.0 if s.steer == "none" else 4.0)
    for steer in ("steer", "random"):
        assert result.curve("perplexity:m", steer, "total_perplexity") == [4, 4, 7, 4, 4]


def test_pnes_is_that_of_the_curve_in_the_report() -> None:
    # y(g) = tanh(g) / exp(g^2 / 10) exactly: ppl = 4 exp(g^2 / 10), effect = 1/2 + tanh(g).
    def perplexity(s: Condition) -> float:
        return 4 * math.exp(s.strength**2 / 10)

    def effect(s: Condition) -> float:
        return 0.5 + (math.tanh(s.strength) if s.steer == "steer" else 0.0)

    result = report(effect, perplexity).normalised["lexicon:mine"]
    grid = [-2 + 4 * i / 199 for i in range(200)]
    expected = 2 * max(math.tanh(g) / math.exp(g * g / 10) for g in grid)
    assert not isinstance(result["steer"], str) and not isinstance(result["random"], str)
    assert result["steer"].pnes == pytest.approx(expected, rel=1e-4)
    assert result["random"].pnes == pytest.approx(0, abs=1e-6)


def test_without_perplexity_or_effect_nothing_is_normalised() -> None:
    assert report(rising, rising, judges=(LEXICON,)).data["normalised_effect"] == {}
    assert report(rising, lambda s: 4.0, judges=(PERPLEXITY,)).data["normalised_effect"] == {}


def test_the_report_gives_the_reason_for_no_normalised_effect() -> None:
    result = report(rising, lambda s: math.nan).data["normalised_effect"]["lexicon:mine"]
    assert "PNES needs" in result["steer"]["reason"]
    message = markdown(report(rising, lambda s: math.nan))
    assert "- lexicon:mine, random: PNES needs an effect" in message


def test_a_name_in_brackets_is_shown_unchanged() -> None:
    console = Console(width=80)
    settings = condition_grid((1.0,))
    scores = {"a[/b]": {s.name: {"share": 0.5, "total_perplexity": 4.0} for s in settings}}
    with console.capture() as text:
        for table in tables(
            make_report(ABOUT, settings, [JudgeEntry("a[/b]", "share")], scores, {})
        ):
            console.print(table)
    assert text.get().count("a[/b]") == 3  # its table, and its two rows of the last


def test_json_has_null_where_there_is_no_number() -> None:
    text = as_json(report(lambda s: math.nan, lambda s: math.inf).data)
    first = json.loads(text, parse_constant=lambda name: pytest.fail(name))["settings"][0]
    assert first["figures"]["lexicon:mine"] == {"share": None}
    assert first["figures"]["perplexity:m"] == {"total_perplexity": None}


def test_tables_show_the_control_beside_the_steer() -> None:
    result = report(rising, lambda s: 12345.0)
    console = Console(width=80)
    with console.capture() as text:
        for table in tables(result):
            console.print(table)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.get().splitlines()]
    assert [row for row in rows if row and row[0] == "2"] == [
        ["2", "steer", "0.900"],
        ["2", "random", "0.500"],
        ["2", "steer", "1.23e+04"],
        ["2", "random", "1.23e+04"],
    ]
    lines = markdown(result).splitlines()
    assert "| 0 | none | 0.500 |" in lines
    assert "- perspective: no service" in lines


@pytest.mark.parametrize("judges", [(LEXICON, PERPLEXITY), (LEXICON,), (PERPLEXITY,), ()])
def test_a_plot_shows_the_figures_that_exist(tmp_path: Path, judges: Any) -> None:
    result = report(rising, lambda s: 4 * math.exp(s.strength**2), judges=judges)
    draw_report(result, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_that_cannot_be_written_is_a_plain_error(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match=r"report\.png: cannot be written"):
        draw_report(report(rising, lambda s: 4.0), tmp_path / "gone" / "report.png")


def test_standard_errors_stand_beside_their_figures(tmp_path: Path) -> None:
    """Shares 1, 0, 1/2 of three prompts: standard error of their mean is 0.5 / sqrt(3)."""
    run, (setting, *_) = open_run(tmp_path, ABOUT), condition_grid((0.0,))
    run.write(setting, [Answers("p", pair) for pair in (("a", "a"), ("b", "b"), ("a", "b"))])
    judge = LexiconJudge("lexicon:mine", lambda text: float(text == "a"))
    counts: list[int] = []
    scores = score(run, [setting], [judge], on_text=lambda n, _: counts.append(n))
    assert counts == [0, 2, 4, 6, 6]
    error = 0.5 / math.sqrt(3)
    expected = {"share": 0.5, "share_error": error, "undecided": 0.0, "undecided_error": 0.0}
    assert scores["lexicon:mine"]["none"] == pytest.approx(expected)
    made = make_report(ABOUT, [setting], [LEXICON], scores, {})
    assert made.data["settings"][0]["figures"]["lexicon:mine"]["share_error"] == pytest.approx(
        error
    )
    (table,) = tables(made)
    assert [column.heading for column in table.columns[2:]] == ["share", "undecided"]
    assert table.rows == [(0.0, "none", "0.500 ± 0.3", "0.000")]
