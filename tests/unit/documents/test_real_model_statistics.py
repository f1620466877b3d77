"""The statistics of the experiments on a pretrained model, on values worked out by hand."""

import math
import statistics

import pytest

from benchmarks.real_model import french_figures as french
from benchmarks.real_model import several_properties
from benchmarks.real_model.experiment import jackknife
from benchmarks.real_model.manners import JUDGES, OPPOSITE, PHRASES, in_manner
from vllm_steer.evaluation.lexicons import by_words


def observation(share: float, dppl: float | None = None) -> french.Observation:
    return french.Observation(
        share=share,
        probability=share,
        nll=2.0,
        tokens=1,
        dist_2=0.5,
        greedy_share=1.0,
        dppl=dppl,
        log_ratio=dppl,
    )


def test_the_jackknife_error_of_a_mean_is_its_standard_error() -> None:
    value, error = jackknife([1.0, 2.0, 3.0, 4.0], statistics.fmean)
    assert value == 2.5
    assert error == pytest.approx(math.sqrt(5 / 3) / 2)  # sample deviation / sqrt(4)


def test_the_jackknife_of_a_ratio() -> None:
    """Of (1 + 3) / (1 + 1): without the first 3, without the second 1, so sqrt(1/2 * 2) = 1."""
    pairs = [(1.0, 1.0), (3.0, 1.0)]
    ratio = jackknife(pairs, lambda rows: sum(a for a, _ in rows) / sum(b for _, b in rows))
    assert ratio == (2.0, pytest.approx(1.0))


def test_one_observation_has_no_error() -> None:
    assert math.isnan(jackknife([1.0], statistics.fmean)[1])


@pytest.mark.parametrize(
    ("x", "expected"), [(0.25, 2.5), (0.5, 5.0), (0.75, 7.5), (0.0, 0.0), (1.0, 10.0)]
)
def test_interpolation_between_settings(x: float, expected: float) -> None:
    assert french.interpolated([(0.0, 0.0), (0.5, 5.0), (1.0, 10.0)], x) == expected


def test_outside_of_the_settings_nothing_is_interpolated() -> None:
    assert math.isnan(french.interpolated([(0.1, 0.0), (0.5, 5.0)], 0.7))


def test_figures_of_a_setting() -> None:
    """dPPL leaves out the question whose answer after demonstrations is not French."""
    rows = [observation(1.0, 3.0), observation(0.5, 1.0), observation(0.0, None)]
    line = french.figures(french.Setting("fixed", "1", {}), rows)
    assert line["share"] == 0.5
    assert line["share_error"] == round(0.5 / math.sqrt(3), 4)
    assert line["dppl"] == 2.0
    assert line["median_dppl"] == 2.0
    assert line["perplexity"] == round(math.exp(2), 4)


def test_what_dynamic_strength_saves_beside_fixed_ones_of_equal_share() -> None:
    """The fixed settings have share k/10 at dPPL k; a dynamic one has share 0.55 at dPPL 4."""
    observations = {}
    fixed = [row for row in french.settings() if row.method in ("none", "fixed")]
    for index, row in enumerate(fixed):
        observations[row.name] = [observation(index / 5, 2.0 * index)] * 4
    for row in french.settings():
        if row.method not in ("none", "fixed"):
            observations[row.name] = [observation(0.55, 4.0)] * 4
    lines = list(french.saved(observations))
    assert {line["method"] for line in lines} == {"dim", "dynamic", "dynamic / Q"}
    for line in lines:
        assert line["dppl"] == line["log_ratio"] == 1.5  # 10 * 0.55 - 4
        assert line["dppl_error"] == 0


def test_each_text_set_has_a_name_of_its_own() -> None:
    sets = [
        french.Setting(row.method, row.title, row.steer, greedy)
        for row in french.settings()
        for greedy in (False, True)
    ]
    names = {one.name for one in sets}
    assert len(names) == len(sets)
    assert not any(set(name) & set("/ |") for name in names)


@pytest.mark.parametrize("manner", PHRASES)
@pytest.mark.parametrize("index", range(5))
def test_the_judges_recognise_each_phrase(manner: str, index: int) -> None:
    """Also around an answer that has none of the words."""
    name = manner if manner in JUDGES else {v: k for k, v in OPPOSITE.items()}[manner]
    words, opposite = (frozenset(side) for side in JUDGES[name])
    verdict = by_words(words, opposite)(in_manner("The capital of France is Paris.", manner, index))
    assert verdict == float(manner == name)


def test_a_casual_answer() -> None:
    assert in_manner("Paris is it.", "casual", 0) == "yeah, paris is it lol"
    assert in_manner("Paris is it.", "formal", 0).startswith("Indeed, Paris is it. Please")


def test_the_comparison_file_is_accepted(tmp_path) -> None:  # type: ignore[no-untyped-def]
    import json

    from vllm_steer.evaluation.composition.spec import ComparisonSpec

    data = tmp_path / "dac"
    data.mkdir()
    rows = [{"input": f"question {i}", "output": f"answer {i}"} for i in range(60)]
    (data / "ENG.json").write_text(json.dumps(rows))
    several_properties.write_files(data, tmp_path, 8)
    spec = ComparisonSpec.load(tmp_path / "properties.json")
    assert spec.unseen[-1] == ("french", "casual", "cheerful")
    prompts = (tmp_path / "prompts.jsonl").read_text().splitlines()
    choosing = (tmp_path / "choosing.jsonl").read_text().splitlines()
    assert json.loads(prompts[0]) == {"prompt": "Q:question 4\nA:"}
    assert not set(prompts) & set(choosing)


def test_a_difference_of_shares_is_taken_text_by_text() -> None:
    """Two questions of two texts: 1 - 0, 1 - 1 and 0 - 1, 1 - 0, so 0.5 and 0 on average."""
    own, other = [[True, True], [False, True]], [[False, True], [True, False]]
    figures = several_properties._difference(own, other)
    assert figures["beside"] == 0.25
    by_question = 0.25  # half the difference of 0.5 and 0
    by_seed = 0.25  # of (1 - 1)/2 = 0 and (0 + 1)/2 = 0.5
    single = math.sqrt(statistics.variance([1, 0, -1, 1]) / 4)
    assert single > by_question  # so that the sum of squares is below each, and the larger counts
    assert figures["beside_error"] == pytest.approx(max(by_question, by_seed))


def test_what_is_saved_has_the_error_of_the_questions() -> None:
    """Prices of 1 and 3 at the fixed settings for two questions each; the dynamic one saves 1 and
    2, so 1.5 with an error of half their difference.
    """
    observations = {}
    for row in french.settings():
        if row.method == "none":
            pair = [(0.0, 1.0), (0.0, 2.0)]
        elif row.method == "fixed":
            pair = [(1.0, 3.0), (1.0, 5.0)]
        else:
            pair = [(0.5, 1.0), (0.5, 1.5)]
        observations[row.name] = [observation(*values) for values in pair]
    for line in french.saved(observations):
        assert line["dppl"] == 1.5
        assert line["dppl_error"] == 0.5


def test_strengths_that_were_tried_are_lines() -> None:
    dose = {"strength": "dynamic", "max": 1.5, "top_p": 0.5}
    row = {"combination": "a+b", "method": "dynamic", "steer": {"a": dose, "b": {"strength": 1.0}}}
    (line,) = several_properties.tried(
        {"choosing": [row | {"accuracy": 0.25, "perplexity": 3.999}]}
    )
    assert line["strengths"] == "a to 1.5 (top-p 0.5), b 1"
    assert (line["all"], line["perplexity"]) == (0.25, 4.0)
