"""The parts of a comparison: specification, candidates, selection, property judges, curves."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from vllm_steer import DeltaSteer, SteerError, VectorSteer
from vllm_steer.evaluation.answers import Answers
from vllm_steer.evaluation.composition.candidates import (
    Choice,
    choices,
    make_candidate,
    skip_reason,
)
from vllm_steer.evaluation.composition.curves import dynamic_curves, raw_strengths, scheduled_curve
from vllm_steer.evaluation.composition.property_judges import PropertyJudges, property_judges, share
from vllm_steer.evaluation.composition.selection import SelectionScores, StrengthSelection, choose
from vllm_steer.evaluation.composition.spec import ComparisonSpec

FR = {"steer": "fr.st", "judge": "lexicon:embedded:language=fr", "strengths": [1, 1.5]}
CHEER = {"steer": "cheer.st", "judge": "lexicon:embedded:sentiment", "strengths": [2, 4]}
DELTA = DeltaSteer(delta=torch.ones(4, 1, 3), layers=(0,))
VECTOR = VectorSteer(vectors=torch.ones(1, 3), layers=(0,))
STEERS: dict[str, Any] = {"fr": DELTA, "cheer": VECTOR}


def load(folder: Path, **changed: Any) -> ComparisonSpec:
    path = folder / "asked.yaml"
    content = {"properties": {"fr": FR, "cheer": CHEER}, "seen": ["fr", "cheer"], **changed}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return ComparisonSpec.load(path)


def test_combinations_stand_in_the_order_of_the_properties_once_each(tmp_path: Path) -> None:
    spec = load(tmp_path, seen=["fr", "cheer", "fr"], unseen="cheer + fr")
    assert (spec.seen, spec.unseen) == ((("fr",), ("cheer",)), (("fr", "cheer"),))


def test_paths_begin_at_the_file_and_one_value_stands_for_a_list(tmp_path: Path) -> None:
    fr = {**FR, "strengths": 1.5, "max": 3}
    spec = load(tmp_path, properties={"fr": fr}, seen="fr", top_p=0.4, examples={"fr": "e.jsonl"})
    assert spec.properties["fr"].steer == tmp_path / "fr.st"
    assert spec.examples == {("fr",): tmp_path / "e.jsonl"}
    assert (spec.properties["fr"].strengths, spec.properties["fr"].max) == ((1.5,), (3.0,))
    assert (spec.top_p, spec.kl) == ((0.4,), ("plain",))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seen": ["fr+de"]}, "property de is unknown; properties: fr, cheer"),
        ({"seen": ["fr+fr"]}, r"fr\+fr names a property twice"),
        ({"seen": []}, "seen is empty; strengths are selected on the seen combinations"),
        ({"seen": ["fr+cheer", "fr"], "unseen": "cheer+fr"}, r"cheer\+fr is both seen and unseen"),
        ({"seen": ["fr"], "unseen": ["cheer"]}, "cheer is in no seen combination"),
        (
            {"examples": {"fr+cheer": "e"}},
            r"examples has cheer\+fr, which is neither in seen nor in unseen",
        ),
        (
            {"properties": {"fr": {**FR, "strengths": [0, 1]}}},
            "0 is not a valid strength; the method 'none'",
        ),
        ({"properties": {"fr": {**FR, "strengths": []}}}, r"properties\.fr\.strengths is \[\]"),
        ({"properties": {"fr": {**FR, "weight": 1}}}, r"unknown key 'properties\.fr\.weight'"),
        ({"properties": {"a b": FR}}, "'a b' is not a valid name"),
        ({"top_p": 0}, r"top_p\.0 is 0: Input should be greater than 0"),
        ({"methods": ["fixed", "best"]}, r"methods\.1 is 'best'"),
    ],
)
def test_errors_in_a_file_are_named(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(SteerError, match=message):
        load(tmp_path, **changed)


@pytest.mark.parametrize("changed", [{"properties": {"fr": {**FR, "steer": "~nobody_here/x"}}}])
def test_the_folder_of_an_unknown_user_is_named(tmp_path: Path, changed: dict[str, Any]) -> None:
    changed |= {"seen": ["fr"], "unseen": []}
    with pytest.raises(SteerError, match="~nobody_here/x: is not a valid path"):
        load(tmp_path, **changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"examples": {"fr+cheer": "a", "cheer+fr": "b"}}, "a combination is listed twice"),
        ({"examples": {"fr+cheer": "a", "fr + cheer": "b"}}, "a combination is listed twice"),
        ({"seen": [True]}, "True is not a string; give names joined by"),
        ({"seen": None}, "None is not a string"),
        ({"seen": [1.5]}, "1.5 is not a string"),
        ({"properties": {"fr": {**FR, "dynamic": "off"}}}, r"properties\.fr\.dynamic is 'off'"),
        ({"properties": {"fr": {**FR, "strengths": ["1_0"]}}}, "expected a number"),
    ],
    ids=str,
)
def test_names_and_numbers_of_two_meanings_are_refused(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(SteerError, match=message):
        load(tmp_path, **changed)


def test_a_file_that_is_not_a_spec_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        SteerError, match=r"none\.yaml: no such file; give a YAML file of properties"
    ):
        ComparisonSpec.load(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(SteerError, match="expected a mapping with at least 'properties'"):
        ComparisonSpec.load(tmp_path / "list.yaml")


def test_a_method_tries_the_product_of_what_each_property_has(tmp_path: Path) -> None:
    spec = load(tmp_path, top_p=[0.4, 0.6], properties={"fr": FR, "cheer": {**CHEER, "max": 5}})
    pairs = [(1, 2), (1, 4), (1.5, 2), (1.5, 4)]
    assert [dict(c.doses) for c in choices("dim", spec, STEERS)] == [
        {"fr": {"strength": a, "schedule": "dim"}, "cheer": {"strength": b}} for a, b in pairs
    ]
    assert [dict(c.doses) for c in choices("dynamic", spec, STEERS)] == [
        {
            "fr": {"strength": "dynamic", "max": 2, "top_p": p, "kl": "plain"},
            "cheer": {"strength": "dynamic", "max": 5, "top_p": p, "kl": "plain"},
        }
        for p in (0.4, 0.6)
    ]
    assert [dict(c.doses) for c in choices("none", spec, STEERS)] == [{}]


def test_a_property_may_stay_fixed_among_dynamic_ones(tmp_path: Path) -> None:
    cheer = {**CHEER, "dynamic": False, "layers": "0", "phase": "generation"}
    spec = load(tmp_path, properties={"fr": FR, "cheer": cheer})
    result = [choice.doses["cheer"] for choice in choices("dynamic", spec, STEERS)]
    assert result == [{"strength": v, "layers": "0", "phase": "generation"} for v in (2, 4)]
    assert skip_reason("dynamic", ("cheer",), spec, STEERS) == (
        "does not apply: no property here is dynamic"
    )


@pytest.mark.parametrize("method", ["start", "dim"])
def test_schedules_are_not_for_other_kinds(tmp_path: Path, method: Any) -> None:
    spec = load(tmp_path)
    assert (skip_reason(method, ("cheer",), spec, STEERS) or "").startswith("does not apply")
    assert skip_reason(method, ("fr", "cheer"), spec, STEERS) is None


def test_the_same_request_gives_the_same_texts_for_every_method(tmp_path: Path) -> None:
    spec = load(tmp_path)
    dim, fixed = (choices(method, spec, STEERS)[0] for method in ("dim", "fixed"))
    assert (
        make_candidate("test", ("cheer",), dim).name
        == make_candidate("test", ("cheer",), fixed).name
    )
    names = {make_candidate("test", ("fr",), choice).name for choice in (dim, fixed)}
    assert len(names) == 2 and all(name.startswith("test.fr.") for name in names)
    none = choices("none", spec, STEERS)[0]
    assert {make_candidate("test", c, none).name for c in spec.seen} == {"test.none"}


def measure(table: Mapping[str, tuple[float, float]]) -> Any:
    return lambda choice, _: SelectionScores(*table[choice.doses["a"]["strength"]])


@pytest.mark.parametrize(
    ("table", "tolerance", "expected"),
    [
        ({"x": (0.9, 5.0), "y": (0.95, 9.0)}, 0.0, "y"),
        ({"x": (0.94, 5.0), "y": (0.95, 9.0)}, 0.02, "x"),
        ({"x": (0.9, 5.0), "y": (0.95, 9.0)}, 0.02, "y"),
        ({"x": (0.9, 5.0), "y": (0.9, 5.0)}, 0.0, "x"),
        ({"x": (0.9, math.nan), "y": (0.9, 900.0)}, 0.0, "y"),
    ],
    ids=["highest share", "cheaper within tolerance", "too far below", "first of equals", "NaN"],
)
def test_the_cheapest_choice_close_to_the_best_is_taken(
    table: dict[str, tuple[float, float]], tolerance: float, expected: str
) -> None:
    options = [Choice("fixed", {"a": {"strength": key}}) for key in table]
    assert choose(options, [("a",)], measure(table), tolerance).doses["a"]["strength"] == expected


def test_over_combinations_shares_are_averaged_and_perplexities_by_their_logarithm() -> None:
    figures = {("x", "a"): (1.0, 1.0), ("x", "b"): (0.5, 16.0), ("y", "a"): (0.75, 5.0)}
    figures["y", "b"] = (0.75, 5.0)
    options = [Choice("fixed", {"a": {"strength": key}}) for key in "yx"]
    result = choose(
        options,
        [("a",), ("b",)],
        lambda choice, names: SelectionScores(*figures[choice.doses["a"]["strength"], names[0]]),
        0.0,
    )
    assert result.doses["a"]["strength"] == "x"  # 0.75 both; sqrt(1 * 16) = 4 beside 5


def test_one_strength_per_property_serves_all_seen_combinations(tmp_path: Path) -> None:
    spec = load(tmp_path, seen=["fr", "cheer", "fr+cheer"], methods=["fixed"])
    selection = StrengthSelection(spec, STEERS, 0.0)
    # Alone fr does best at 1.5, and together with cheer at 1, by more.
    accuracy = {(1.5,): 0.6, (1,): 0.5, (2,): 1.0, (4,): 1.0, (1, 4): 0.9, (1.5, 4): 0.5}
    measurements = []
    for candidate in selection.candidates:
        strengths = tuple(dose["strength"] for dose in candidate.steer.values())
        measurements.append((candidate, SelectionScores(accuracy.get(strengths, 0.1), 4.0)))
    assert len(measurements) == 2 + 2 + 4
    selected = selection.select(measurements)
    assert [dose["strength"] for dose in selected.methods["fixed"].doses.values()] == [1, 4]
    assert selected.best_fixed[("fr",)].of(("fr",)) == {
        "fr": {"strength": 1.5, "schedule": "fixed"}
    }


def test_nothing_is_tried_where_there_is_one_choice(tmp_path: Path) -> None:
    fr = {**FR, "strengths": 1}
    selection = StrengthSelection(
        load(tmp_path, properties={"fr": fr}, seen="fr"), {"fr": DELTA}, 0.02
    )
    assert selection.candidates == []
    selected = selection.select([])
    assert list(selected.methods) == ["none", "fixed", "start", "dim", "dynamic"]


def answers(*texts: str) -> list[Answers]:
    return [Answers("p", texts[:2]), Answers("q", texts[2:])]


def test_a_text_has_all_properties_only_if_every_judge_says_so(tmp_path: Path) -> None:
    spec = load(tmp_path)
    judges = PropertyJudges(spec, property_judges(spec))
    french_good, french_bad = " La chambre est magnifique.", " La chambre est affreuse."
    value = answers(french_good, french_bad, " The room is wonderful.", " 12")
    assert judges.has("fr", "t", value) == [[True, True], [False, False]]
    assert judges.has("cheer", "t", value) == [[True, False], [True, False]]
    assert judges.has_all(("fr", "cheer"), "t", value) == [[True, False], [False, False]]
    assert share(judges.has_all(("fr", "cheer"), "t", value)) == 0.25


def test_an_undecided_text_has_neither_a_property_nor_its_opposite(tmp_path: Path) -> None:
    gloom = {**CHEER, "opposite": True}
    spec = load(tmp_path, properties={"gloom": gloom}, seen="gloom")
    judges = PropertyJudges(spec, property_judges(spec))
    value = answers(" The room is wonderful.", " The room is awful.", " 12", "")
    assert judges.has("gloom", "t", value) == [[False, True], [False, False]]


def test_a_judge_without_a_property_is_refused(tmp_path: Path) -> None:
    spec = load(tmp_path, properties={"fr": {**FR, "judge": "diversity"}}, seen="fr")
    with pytest.raises(
        SteerError, match="property fr: judge diversity does not decide for each text"
    ):
        property_judges(spec)


def test_strengths_over_tokens_are_those_of_the_texts_that_reach_them() -> None:
    texts = ({"fr": (2.0, 1.0)}, {"fr": (1.0, 0.5, 4.0)}, {"fr": (0.0, 0.0)})
    result = dynamic_curves([Answers("p", ("a", "b"), texts[:2]), Answers("q", ("c",), texts[2:])])
    curve = result["fr"]
    assert (curve.mean, curve.texts) == ((1.0, 0.5, 4.0), (3, 3, 1))
    # Of 0, 1, 2 the quartiles lie half-way between the middle and the ends.
    assert curve.lower == (0.5, 0.25, 4.0) and curve.upper == (1.5, 0.75, 4.0)
    assert dynamic_curves([Answers("p", ("a",))]) == {}


def test_raw_strengths_are_kept_by_prompt_and_text() -> None:
    answers = [Answers("p", ("a", "b"), ({"fr": (2.0,)}, {"fr": ()})), Answers("q", ("",), ({},))]
    assert raw_strengths(answers) == {"fr": [[[2.0], []], [[]]]}


@pytest.mark.parametrize(
    ("dose", "expected"),
    [
        ({"strength": 2, "schedule": "fixed"}, (2, 2, 2, 2, 0)),
        ({"strength": 2, "schedule": "start"}, (2, 0, 0, 0, 0)),
        ({"strength": 2, "schedule": "dim"}, (2, 1.5, 1, 0.5, 0)),
    ],
)
def test_a_deltas_strengths_end_with_its_steps(
    dose: dict[str, Any], expected: Sequence[float]
) -> None:
    assert scheduled_curve(dose, DELTA, 5) == expected
    assert scheduled_curve({"strength": 3}, VECTOR, 2) == (3, 3)
