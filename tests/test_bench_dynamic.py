"""The benchmark of dynamic strength runs from start to end, and its parts are what they say."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.dynamic import counting, figures, legs, loop

ROOT = Path(__file__).parents[1]

ROW_KEYS = {
    "model",
    "figure",
    "what",
    "requests",
    "a_ms",
    "b_ms",
    "ratio",
    "ratio_p20",
    "ratio_p80",
    "ratios",
    "rounds",
    "predicted",
    "goal",
}
CASES = [
    *(
        ("cost", what, requests)
        for requests in (1, 2)
        for what in ("delta dynamic", "lm dynamic", "delta fixed", "two steps, three rows")
    ),
    ("loop", "authors' loop over ours", 1),
    ("loop", "authors' loop over ours", 2),
    ("ordinary", "16 beside 1 dynamic", 16),
]


@pytest.mark.matrix
def test_every_figure_is_measured_beside_what_counting_predicts(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    line = [sys.executable, "-m", "benchmarks.dynamic_cost", "--quick", "--json", str(path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(path.read_text())
    assert {"cpu", "cores", "load_average"} <= set(result["machine"])
    assert (result["tokens"], result["prompt_tokens"]) == (10, 32)
    assert [(row["figure"], row["what"], row["requests"]) for row in result["rows"]] == CASES
    for row in result["rows"]:
        assert set(row) >= ROW_KEYS
        assert len(row["ratios"]) == row["rounds"] == 2
        assert row["ratio_p20"] <= row["ratio"] <= row["ratio_p80"]
        assert all(math.isfinite(row[key]) and row[key] > 0 for key in ("a_ms", "b_ms", "ratio"))
    assert [row["equal_tokens"] for row in result["rows"] if row["figure"] == "loop"] == [1, 1]


def test_the_time_of_a_token_is_half_of_that_of_two_without_the_first_and_last() -> None:
    # A slow start, then steps that alternate between 1 and 3 s, then a slow end.
    gaps = [50, 50, 50, 50, 1, 3, 1, 3, 1, 3, 90]
    arrivals = [float(sum(gaps[:count])) for count in range(len(gaps) + 1)]
    assert legs.token_time_ms(arrivals) == pytest.approx(2000.0)


def test_a_leg_has_prompts_of_its_own_and_gives_them_again() -> None:
    prompts = legs.Prompts(vocab_size=100)
    first = [prompts[0], prompts[1]]
    assert first == [prompts[0], prompts[1]]
    assert first[0] != first[1]
    assert prompts.next_leg()[0] not in first
    assert all(3 <= token < 100 for token in first[0])


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (counting.of_request("delta dynamic", 0.25), (2.0, 3.0)),
        (counting.of_request("lm dynamic", 0.25), (1.0, 1.5)),
        (counting.of_request("delta fixed", 0.25), (1.0, 1.0)),
        # 3 passes over 32 to 61 tokens, 46.5 in the mean, against 2 steps for 16 and 3 rows each.
        (counting.of_loop(16, prompt_tokens=32, tokens=30), (24.0, 46.5)),
        # 16 + 6 rows in every step against 16 + 4 and 16 + 2 in turn.
        (counting.of_ordinary(16, 2), (1.0, 22 / 19)),
    ],
    ids=["delta", "lm", "fixed", "loop", "ordinary"],
)
def test_counting(found: tuple[float, float], wanted: tuple[float, float]) -> None:
    assert found == pytest.approx(wanted)


def test_the_loops_divergence_is_over_the_likeliest_of_both_sides() -> None:
    p0 = torch.tensor([0.5, 0.3, 0.1, 0.1])
    p1 = torch.tensor([0.1, 0.1, 0.2, 0.6])
    # top(p0, .6) = {0, 1}, top(p1, .55) = {3}; over 0, 1 and 3 the sums are 0.9 and 0.8.
    q0, q1 = (0.5 / 0.9, 0.3 / 0.9, 0.1 / 0.9), (0.1 / 0.8, 0.1 / 0.8, 0.6 / 0.8)
    wanted = sum(a * math.log(a / b) for a, b in zip(q0, q1, strict=True))
    found = loop.divergence_over_likeliest(p0.log(), p1.log(), 0.55)
    assert found == pytest.approx(wanted, rel=1e-5)


def written(*tokens: int, margins: tuple[float, ...]) -> loop.Written:
    return loop.Written(tokens, margins)


def test_texts_may_part_only_where_two_tokens_are_as_likely() -> None:
    same = figures.same_share
    assert same((1, 2, 3, 4), written(1, 2, 3, 4, margins=(1, 1, 1, 1))) == 1.0
    assert same((1, 2, 9, 9), written(1, 2, 3, 4, margins=(1, 1, 1e-3, 1))) == 0.5
    with pytest.raises(SystemExit, match="differ at token 2: 9, 3"):
        same((1, 2, 9, 9), written(1, 2, 3, 4, margins=(1, 1, 0.5, 1)))
