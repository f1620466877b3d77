"""Points and selection of a sweep, on known curves."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_steer import DeltaSteer, SteerError, VectorSteer, load_steer, save_steer
from vllm_steer.evaluation.prompts import Prompts
from vllm_steer.sweep import report
from vllm_steer.sweep.candidates import CandidateLayers, parse_candidates
from vllm_steer.sweep.search import Point, bisection, choose, grid
from vllm_steer.sweep.sweep_run import (
    Search,
    SweepResult,
    SweepSettings,
    check_writable,
    write_choice,
)

ALL = CandidateLayers("all", (0, 1, 2, 3))
BUDGET = 1.2
PROMPTS = Prompts(("a", "b"), "p.txt", "0" * 64)


def point(strength: float, effect: float, ratio: float, candidate: CandidateLayers = ALL) -> Point:
    return Point(candidate, strength, effect, 4.0 * ratio, ratio)


def exploding(candidate: CandidateLayers, strength: float) -> Point:
    """The effect rises and saturates; perplexity explodes: ratio exp(g^2 / 50)."""
    return point(strength, math.tanh(abs(strength) / 3), math.exp(strength**2 / 50), candidate)


def pick(points: Sequence[Point], unsteered: float = 0.0, **options: Any) -> Point:
    defaults: dict[str, Any] = {"budget": BUDGET, "direction": "up", "texts": 400}
    return choose(points, unsteered, **{**defaults, **options})


def test_a_grid_measures_every_candidate_at_every_strength_but_zero() -> None:
    some = CandidateLayers("0-1", (0, 1))
    points = list(grid(exploding, [ALL, some], (-1.0, 0.0, 2.0)))
    assert [(p.candidate.name, p.strength) for p in points] == [
        ("all", -1.0),
        ("all", 2.0),
        ("0-1", -1.0),
        ("0-1", 2.0),
    ]


def test_bisection_closes_in_on_the_budget() -> None:
    # ratio = 1.2 at g = sqrt(50 ln 1.2) = 3.0193; halving 0..10 six times leaves 10 / 64.
    points = list(bisection(exploding, [ALL], (0.0, 10.0), rounds=6, budget=BUDGET))
    assert [p.strength for p in points] == [10, 5, 2.5, 3.75, 3.125, 2.8125, 2.96875]
    assert pick(points).strength == 2.96875


def test_bisection_goes_down_as_well() -> None:
    points = list(bisection(exploding, [ALL], (0.0, -10.0), rounds=2, budget=BUDGET))
    assert [p.strength for p in points] == [-10, -5, -2.5]


@pytest.mark.parametrize("rounds", [1, 4, 9])
def test_bisection_is_bounded(rounds: int) -> None:
    def never(candidate: CandidateLayers, strength: float) -> Point:
        return point(strength, 0.5, math.nan, candidate)

    points = list(bisection(never, [ALL, ALL], (0.0, 10.0), rounds=rounds, budget=BUDGET))
    assert len(points) == 2 * (rounds + 1) == Search(rounds=rounds).points(2)


def test_a_far_end_within_the_budget_ends_the_bisection() -> None:
    points = list(bisection(exploding, [ALL], (0.0, 2.0), rounds=6, budget=BUDGET))
    assert [p.strength for p in points] == [2.0]


def test_the_strongest_effect_within_the_budget_is_taken() -> None:
    points = [point(1, 0.6, 1.01), point(2, 0.8, 1.1), point(3, 0.7, 1.15), point(4, 0.95, 1.3)]
    assert pick(points, 0.5).strength == 2
    assert pick(points, 0.5, budget=1.3).strength == 4
    assert pick(points, 0.5, budget=1.05).strength == 1


def test_downwards_the_lowest_effect_is_taken() -> None:
    points = [point(1, 0.6, 1.0), point(-1, 0.3, 1.1), point(-2, 0.1, 1.5)]
    assert pick(points, 0.5, direction="down").strength == -1


def test_of_equal_effects_the_more_natural_is_taken() -> None:
    points = [point(3, 1.0, 1.1), point(2, 1.0, 1.05), point(4, 1.0, 1.15)]
    assert pick(points, 0.5).strength == 2


@pytest.mark.parametrize("ratio", [math.nan, math.inf])
def test_a_perplexity_that_is_no_number_is_over_any_budget(ratio: float) -> None:
    assert pick([point(1, 0.7, 1.0), point(9, 1.0, ratio)], 0.2).strength == 1


def test_a_sweep_without_a_point_in_the_budget_reports_it() -> None:
    expected = r"the lowest perplexity ratio is 1\.5 and the budget is 1\.2"
    with pytest.raises(SteerError, match=expected):
        pick([point(1, 0.9, 1.5), point(2, 1.0, 4.0)])


def test_a_sweep_without_a_change_in_the_budget_reports_it() -> None:
    expected = r"the effect significantly: the largest change is from 0\.500 to 0\.500"
    with pytest.raises(SteerError, match=expected):
        pick([point(1, 0.5, 1.0), point(2, 0.4, 1.1)], 0.5)


def test_a_change_within_chance_does_not_count() -> None:
    # Two standard errors of a difference over 100 texts: 2 sqrt((.58 .42 + .5 .5) / 100) = 0.1405.
    with pytest.raises(SteerError, match="within two standard errors over 100 texts"):
        pick([point(1, 0.58, 1.0)], 0.5, texts=100)
    assert pick([point(1, 0.58, 1.0)], 0.5, texts=400).strength == 1  # 0.0702


def vector(**fields: Any) -> VectorSteer:
    rows = torch.arange(1.0, 13.0).view(4, 3)
    return VectorSteer(vectors=rows, layers=(2, 3, 5, 8), **fields)


def test_candidates_are_read_in_their_order_and_each_once() -> None:
    scores = (0.6, 0.9, 0.7, 0.9)
    result = parse_candidates("top:1,3; all;2-3,8;top:4", vector(layer_scores=scores))
    assert [(c.name, c.layers) for c in result] == [
        ("top:1", (3,)),  # the lower of the two that score 0.9
        ("top:3", (3, 5, 8)),
        ("all", (2, 3, 5, 8)),
        ("2-3,8", (2, 3, 8)),
    ]
    assert parse_candidates(None, vector()) == [CandidateLayers("all", (2, 3, 5, 8))]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("top:2", "needs layer_scores, and the steer has none; name the layers"),
        ("4", "layers 4 are not in this steer; it has 2-3,5,8"),
        ("all;", "layers is ''"),
    ],
)
def test_invalid_layers_are_refused(spec: str, message: str) -> None:
    with pytest.raises(SteerError, match=message):
        parse_candidates(spec, vector())


@pytest.mark.parametrize("spec", ["top:0", "top:5", "top:x", "top:"])
def test_a_number_of_top_layers_out_of_range_is_refused(spec: str) -> None:
    with pytest.raises(SteerError, match="expected a number of layers from 1 to 4"):
        parse_candidates(spec, vector(layer_scores=(1.0, 2.0, 3.0, 4.0)))


def test_a_steer_without_layers_or_scores_has_no_such_candidates(make_steer: Any) -> None:
    with pytest.raises(
        SteerError, match="layers does not apply to an LM-Steer, which acts at the LM head"
    ):
        parse_candidates("all", make_steer())
    assert parse_candidates(None, make_steer()) == [CandidateLayers("all", None)]
    delta = DeltaSteer(delta=torch.ones(2, 3, 4), layers=(0, 1, 2))
    assert parse_candidates("0-1", delta)[0].layers == (0, 1)
    with pytest.raises(SteerError, match="needs layer_scores"):
        parse_candidates("top:1", delta)


def sweep_result(steer: Path, points: Sequence[Point], layers: str | None = None) -> SweepResult:
    settings = SweepSettings("m", steer, PROMPTS, "lexicon:x", "perplexity:m", layers=layers)
    return SweepResult(
        settings, Point(CandidateLayers("none", None), 0.0, 0.5, 4.0, 1.0), tuple(points), 400
    )


def test_the_written_file_keeps_the_recipe_and_all_layers(tmp_path: Path) -> None:
    path = tmp_path / "v"
    save_steer(vector(recipe={"method": "mean"}, description="mine"), path)
    result = sweep_result(path, [point(2.5, 0.9, 1.1)])
    write_choice(result, result.choose())
    loaded = load_steer(path)
    assert torch.equal(loaded.vectors, vector().vectors)
    assert (loaded.default_strength, loaded.description) == (2.5, "mine")
    assert loaded.recipe["method"] == "mean"
    assert loaded.recipe["sweep"]["chosen"]["strength"] == 2.5
    assert loaded.recipe["sweep"]["settings"]["budget"] == 1.2


def test_the_chosen_layers_are_written_if_some_were_tried(tmp_path: Path) -> None:
    path = tmp_path / "v"
    save_steer(vector(layer_scores=(1.0, 4.0, 2.0, 3.0)), path)
    top = CandidateLayers("top:2", (3, 8))
    result = sweep_result(path, [point(2.5, 0.9, 1.1, top)], layers="top:2")
    write_choice(result, result.choose())
    loaded = load_steer(path)
    assert (loaded.layers, loaded.layer_scores) == ((3, 8), (4.0, 3.0))
    assert torch.equal(loaded.vectors, vector().vectors[[1, 3]])


def test_only_a_file_of_our_own_is_written_to(tmp_path: Path) -> None:
    save_steer(vector(), tmp_path / "own")
    check_writable(tmp_path / "own")
    torch.save(torch.ones(3), tmp_path / "theirs.pt")
    with pytest.raises(SteerError, match=r"theirs\.pt: this is not a vllm-steer file.* convert"):
        check_writable(tmp_path / "theirs.pt")
    with pytest.raises(SteerError, match="none: no such file"):
        check_writable(tmp_path / "none")


def test_all_points_are_reported_and_the_choice_is_marked(tmp_path: Path) -> None:
    points = [point(4, 0.95, 1.4), point(2, 0.9, 1.1), point(3, 0.9, math.nan)]
    result = sweep_result(tmp_path / "v", points)
    message = report.data(result, result.choose(), None)
    assert [(p["strength"], p["within_budget"]) for p in message["points"]] == [
        (4, False),
        (2, True),
        (3, False),
    ]
    assert (message["chosen"]["strength"], message["unsteered"]["effect"]) == (2, 0.5)
    notes = [row[-1] for row in report.table(result, result.choose()).rows]
    assert notes == ["", "chosen", "over budget", "over budget"]
    report.draw(result, result.choose(), tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("budget", [1.0, 0.5, math.inf, math.nan])
def test_a_budget_is_a_ratio_above_one(budget: float) -> None:
    with pytest.raises(SteerError, match=r"expected a ratio of perplexities above 1, such as 1\.2"):
        SweepSettings("m", Path("s"), PROMPTS, "lexicon:x", "perplexity:m", budget=budget)


def test_rounds_are_at_least_one() -> None:
    with pytest.raises(SteerError, match="rounds is 0; expected at least 1"):
        SweepSettings("m", Path("s"), PROMPTS, "j", "p", search=Search(rounds=0))
    assert dataclasses.asdict(Search())["ends"] == (0.0, 10.0)
