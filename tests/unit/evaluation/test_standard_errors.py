"""Standard errors of figures: against the formula of a mean's, and against the delta method."""

import math
import random
from collections.abc import Sequence
from statistics import mean, stdev

import pytest

from vllm_steer.evaluation import standard_errors
from vllm_steer.evaluation.answers import Answers, TextJudge
from vllm_steer.evaluation.judges import make_judge
from vllm_steer.evaluation.perplexity import Likelihood, PerplexityJudge, summary
from vllm_steer.evaluation.standard_errors import with_errors
from vllm_steer.evaluation.timings import Timings
from vllm_steer.tables import figure_with_error


def of_means(observations: Sequence[Sequence[float]]) -> dict[str, float]:
    return {"mean": mean(map(mean, observations)), "median": 3.5}


def test_the_error_of_a_mean_is_its_usual_standard_error() -> None:
    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0]
    error = stdev(values) / math.sqrt(len(values))
    expected = pytest.approx({"mean": mean(values), "mean_error": error, "median": 3.5})
    assert with_errors(of_means, [[value] for value in values]) == expected
    # As texts of one prompt with different seeds.
    assert with_errors(of_means, [values]) == expected
    # Three prompts so alike that their texts of one seed are equal are no more than one prompt.
    assert with_errors(of_means, [values] * 3) == expected
    # Texts so alike that a prompt has one of them four times are no more than one text.
    assert with_errors(of_means, [[value] * 4 for value in values]) == expected


def test_the_errors_of_prompts_and_seeds_add_up() -> None:
    """Of ``a_p + b_s``: ``var a / P + var b / S - T^2``. The mean moves by ``(b_s - mean b) /
    (P (S - 1))`` without a text, since it is a mean of prompts' means.
    """
    prompts, seeds = [3.0, 1.0, 4.0, 1.5], [0.5, 2.5, 1.0]
    texts = [[a + b for b in seeds] for a in prompts]
    moves = [(b - mean(seeds)) / (4 * 2) for _ in prompts for b in seeds]
    squared = stdev(prompts) ** 2 / 4 + stdev(seeds) ** 2 / 3
    squared -= 11 / 12 * sum(move**2 for move in moves)
    assert with_errors(of_means, texts)["mean_error"] == pytest.approx(math.sqrt(squared))


def test_many_prompts_are_left_out_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """With groups of equal size the error is that of the mean of the groups' means."""
    values = [random.Random(1).gauss(0, 1) for _ in range(40)]
    sizes: list[int] = []

    def figures(part: Sequence[Sequence[float]]) -> dict[str, float]:
        sizes.append(len(part))
        return of_means(part)

    monkeypatch.setattr(standard_errors, "_GROUPS", 8)
    error = with_errors(figures, [[value] for value in values])["mean_error"]
    groups = [mean(values[start::8]) for start in range(8)]
    assert sizes == [40, *[35] * 8]
    assert error == pytest.approx(stdev(groups) / math.sqrt(8))


def test_the_error_of_a_total_perplexity_agrees_with_the_delta_method() -> None:
    """``exp(sum nll / sum n)``: its error is about itself times that of the ratio estimator."""
    source = random.Random(0)
    prompts = [
        [Likelihood(level * k / 10 + source.gauss(0, 1), k) for k in (8, 10, 14)]
        for level in (source.gauss(30, 4) for _ in range(60))
    ]
    judge = PerplexityJudge("perplexity:m", None)  # type: ignore[arg-type]
    result = with_errors(judge.figures, prompts)
    costs = [sum(text.nll for text in texts) for texts in prompts]
    ratio = sum(costs) / (60 * 32)
    error = stdev(cost - ratio * 32 for cost in costs) / math.sqrt(60) / 32
    assert result["total_perplexity"] == pytest.approx(math.exp(ratio))
    assert result["total_perplexity_error"] == pytest.approx(math.exp(ratio) * error, rel=0.02)
    assert "median_error" not in result and result["dropped_error"] == 0
    assert summary([text for texts in prompts for text in texts])["median"] == result["median"]


def test_a_single_text_and_a_figure_that_is_not_finite_have_no_error() -> None:
    assert with_errors(of_means, [[1.0]]) == {"mean": 1.0, "median": 3.5}
    worst = with_errors(lambda v: {"worst": max(map(max, v))}, [[1.0], [math.inf]])
    assert math.isnan(worst["worst_error"])


def test_the_scores_of_a_judge_are_the_figures_of_its_observations() -> None:
    answers = [Answers("p", ("so good a day", "so bad")), Answers("q", ("good",))]
    judge, counts = make_judge("lexicon:embedded:sentiment"), []
    assert isinstance(judge, TextJudge)
    assert judge.figures(judge.observe(answers, counts.append)) == judge.scores(answers)
    assert counts == [2, 3]
    assert all(map(math.isnan, judge.figures([]).values()))


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.8123, 0.0234, "0.812 ± 0.02"),
        (3.79, 0.0, "3.790"),
        (0.333, 3e-16, "0.333"),
        (20.5, 9.7, "20.500 ± 10"),
        (183.16, 23.7, "183.160 ± 24"),
        (123456.0, 4567.0, "1.23e+05 ± 4.6e+03"),
        (0.5, math.nan, "0.500"),
        (math.nan, math.nan, "-"),
    ],
)
def test_a_figure_with_its_error(value: float, error: float, text: str) -> None:
    assert figure_with_error(value, error) == text


def test_timings_in_a_line() -> None:
    timings = Timings(judging_s=0.25)
    assert str(timings) == "generated no new texts; judged in 0.2 s"
    timings.generated([Answers("p", ("a", "b"), num_tokens=1500)], 4.0)
    timings.generated([Answers("q", ("c",), num_tokens=500)], 12.0)
    assert str(timings) == (
        "generated 3 texts, 2,000 tokens in 16 s (0.19 texts/s, 125 tokens/s); judged in 0.2 s"
    )
