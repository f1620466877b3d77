"""The experiments on ablation and on conditions: directions, figures and tables, worked by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.real_model import ablation, gate_figures
from benchmarks.real_model.ablation_table import ablation_tables
from benchmarks.real_model.gate_table import gate_tables
from benchmarks.real_model.language_direction import Means, held, openings, removed
from benchmarks.real_model.served import kept

MEANS = Means(
    french=torch.tensor([[3.0, 4.0], [0.0, 2.0]], dtype=torch.float64),
    english=torch.tensor([[1.0, 4.0], [0.0, -2.0]], dtype=torch.float64),
)


def test_the_direction_and_where_the_means_lie_along_it() -> None:
    assert MEANS.direction.tolist() == [[2.0, 0.0], [0.0, 4.0]]
    assert MEANS.positions(MEANS.direction) == ([3.0, 2.0], [1.0, -2.0])


def test_a_centred_direction_has_the_means_at_equal_distances_from_zero() -> None:
    """Layer 0 has the common mean (2, 4); in layer 1 there is none, and nothing to take away."""
    means = Means(MEANS.french[:1], MEANS.english[:1])
    centred = means.centred(means.direction)
    assert centred.tolist() == [pytest.approx([1.6, -0.8])]
    (french,), (english,) = means.positions(centred)
    assert french == pytest.approx(-english)
    assert french > 0


def test_one_layer_is_held_on_the_side_of_the_end() -> None:
    """From French at 3 to English at 1: all above 1 is taken away, what lies below stays."""
    steer = held(MEANS.direction, 0, 3.0, 1.0)
    assert (steer.layers, steer.low, steer.high) == ((0,), -math.inf, 1.0)
    steer = held(MEANS.direction, 1, -2.0, 2.0)
    assert (steer.layers, steer.low, steer.high) == ((1,), 2.0, math.inf)
    assert steer.vectors.tolist() == [[0.0, 4.0]]


def test_a_removed_direction_is_bounded_by_zero_in_all_layers() -> None:
    steer = removed(MEANS.direction, "attn_out")
    assert (steer.layers, steer.low, steer.high, steer.mode) == ((0, 1), 0.0, 0.0, "project")
    assert steer.site == "attn_out"


def test_an_opening_is_the_first_words_of_a_longer_answer(tmp_path: Path) -> None:
    outputs = [
        "one two",
        " ".join(f"w{n}" for n in range(12)),
        " ".join(f"v{n}" for n in range(15)),
    ]
    rows = [{"input": "q", "output": output} for output in outputs]
    (tmp_path / "ENG.json").write_text(json.dumps(rows), encoding="utf-8")
    assert openings(tmp_path, "ENG", range(2)) == ["w0 w1 w2 w3 w4 w5"]
    assert len(openings(tmp_path, "ENG", range(3))) == 2


def test_every_setting_names_steers_that_are_made() -> None:
    means = Means(*torch.randn(2, 18, 4, dtype=torch.float64))
    made = ablation.steers_of(means, means)
    named = {name for setting in ablation.settings() for name in setting.doses}
    assert named <= set(made)
    titles = {(one.what, one.layers, one.direction) for one in ablation.settings()}
    assert len(titles) == len(ablation.settings())


def observation(french: float, nll: float, tokens: int) -> ablation.Observation:
    return ablation.Observation(french, 1 - french, french, nll, tokens, 0.5)


def test_the_figures_of_a_setting() -> None:
    """Shares 1 and 0 have the error 1/2; perplexity is over all tokens, 4^(4/4)."""
    rows = [observation(1.0, math.log(4), 1), observation(0.0, 3 * math.log(4), 3)]
    line = ablation.figures(ablation.Setting("removed", "14", {}), "openings", rows, "text")
    assert (line["french"], line["french_error"]) == (0.5, 0.5)
    assert line["english"] == 0.5
    assert line["perplexity"] == 4.0
    assert line["perplexity_error"] == 0.0  # each prompt alone has the same
    assert line["example"] == "text"


def test_answers_are_made_once_and_only_under_the_same_settings(tmp_path: Path) -> None:
    path = tmp_path / "answers.json"
    assert kept(path, {"tokens": (1, 2)}, lambda: ["a"]) == ["a"]
    assert kept(path, {"tokens": [1, 2]}, lambda: pytest.fail("made twice")) == ["a"]
    with pytest.raises(SystemExit, match="was made under other settings; remove it"):
        kept(path, {"tokens": [1]}, lambda: ["b"])


UNSTEERED, ALWAYS, OTHER = (1, 2), (1, 3), (1, 4)


@pytest.mark.parametrize(
    ("always", "gated", "steered"),
    [
        (ALWAYS, ALWAYS, True),
        (ALWAYS, UNSTEERED, False),
        (UNSTEERED, UNSTEERED, None),  # the steer changes nothing on this prompt
        (ALWAYS, OTHER, None),
    ],
)
def test_whether_a_request_was_steered_is_read_from_its_tokens(
    always: tuple[int, ...], gated: tuple[int, ...], steered: bool | None
) -> None:
    assert gate_figures.outcome(True, True, UNSTEERED, always, gated).steered is steered


def test_the_figures_of_a_condition() -> None:
    """Three right, one missed, one too many, one that the tokens do not tell, and one true no."""
    rows = [
        *[gate_figures.outcome(True, True, UNSTEERED, ALWAYS, ALWAYS)] * 3,
        gate_figures.outcome(True, False, UNSTEERED, ALWAYS, UNSTEERED),
        gate_figures.outcome(False, True, UNSTEERED, ALWAYS, ALWAYS),
        gate_figures.outcome(True, True, UNSTEERED, UNSTEERED, UNSTEERED),
        gate_figures.outcome(False, False, UNSTEERED, ALWAYS, OTHER),
    ]
    line = gate_figures.figures(rows)
    assert line["precision"] == line["recall"] == line["f1"] == 0.75
    counts = [line[f"as_{name}"] for name in ("unsteered", "always", "both", "neither")]
    assert (line["requests"], counts) == (7, [1, 4, 1, 1])
    assert line["unexpected"] == 0


def test_a_verdict_that_differs_from_hugging_face_is_counted() -> None:
    rows = [
        gate_figures.outcome(True, False, UNSTEERED, ALWAYS, gated) for gated in (ALWAYS, UNSTEERED)
    ]
    assert gate_figures.figures(rows)["unexpected"] == 1


def test_a_condition_that_never_holds_has_no_precision() -> None:
    rows = [gate_figures.outcome(True, False, UNSTEERED, ALWAYS, UNSTEERED)]
    assert math.isnan(gate_figures.precision(rows))
    assert gate_figures.recall(rows) == gate_figures.f1(rows) == 0.0


HEAD: dict[str, Any] = {
    "model": "small",
    "machine": {"gpu": None, "cpu": "a CPU", "cores": 2, "load_average": [1.0]},
    "versions": {"vllm": "1", "torch": "2", "triton": None},
    "date": "2026-01-02T03:04:05",
    "git": {"commit": "0123456789abcdef", "dirty": False},
    "command": "python -m it",
    "seconds": {"one": 60.0, "two": 59.0},
}


def with_error(**shares: float) -> dict[str, float]:
    return shares | {f"{name}_error": 0.05 for name in shares}


def test_the_table_of_ablation() -> None:
    shares = with_error(french=0.9, english=0.1, greedy_french=0.8, perplexity=4.0, dist_2=0.7)
    row = {"prompts": "openings", "what": "removed", "layers": "14", "direction": "random"}
    data = HEAD | {
        "rows": [row | shares, row | shares | {"prompts": "demonstrations", "what": "unsteered"}],
        "french_mean": [-38.2],
        "english_mean": [-63.7],
        "cosine_with_common": [-0.319],
    }
    lines = ablation_tables(data).splitlines()
    figures = "0.90 ± 0.05 | 0.10 ± 0.05 | 0.80 ± 0.05 | 4.0 ± 0.1 | 0.70 ± 0.05"
    assert lines.index(f"| removed | 14 | random | {figures} |") < lines.index(
        f"| unsteered | 14 | random | {figures} |"
    )
    assert "| 0 | -38 | -64 | -0.32 |" in lines
    assert "2 minutes." in lines


def test_the_tables_of_gates() -> None:
    row = {"gate": "french", "similarity": "cast", "tokens": "any", "layer": 3, "requests": 80}
    counts = {"as_unsteered": 37, "as_always": 40, "as_both": 2, "as_neither": 1, "unexpected": 3}
    effect = {"gate": "negative", "is_positive": False} | with_error(fr=0.25, en=0.75)
    data = HEAD | {
        "rows": [row | counts | with_error(precision=0.9, recall=0.8, f1=0.85)],
        "effects": [effect | {"way": way} for way in ("unsteered", "negative-cosine-last")],
    }
    lines = gate_tables(data).splitlines()
    for expected in (
        "| french | `cast` | `any` | 3 | 0.90 ± 0.05 | 0.80 ± 0.05 | 0.85 ± 0.05 | 77 of 80 |",
        "| french | `cast` | `any` | 37 | 40 | 2 | 1 | 3 |",
        "| positive review | never | 0.25 ± 0.05 | 0.75 ± 0.05 |",
        "| positive review | if the condition holds | 0.25 ± 0.05 | 0.75 ± 0.05 |",
    ):
        assert expected in lines
