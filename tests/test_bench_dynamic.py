"""The benchmark of dynamic strength runs from start to end, and its parts are correct."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.dynamic import served

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
    "rounds",
}
CASES = [
    *(
        ("cost", what, requests)
        for requests in (1, 2)
        for what in ("delta dynamic", "lm dynamic", "delta fixed", "two steps, three rows")
    ),
    ("ordinary", "16 beside 1 dynamic", 16),
]


@pytest.mark.matrix
def test_every_figure_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    line = [sys.executable, "-m", "benchmarks.dynamic_cost", "--quick", "--json", str(path)]
    process = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-4000:]
    result = json.loads(path.read_text())
    assert {"cpu", "cores", "load_average"} <= set(result["machine"])
    assert (result["tokens"], result["prompt_tokens"]) == (10, 32)
    assert [(row["figure"], row["what"], row["requests"]) for row in result["rows"]] == CASES
    for row in result["rows"]:
        assert set(row) >= ROW_KEYS
        assert row["rounds"] == 2
        assert row["ratio_p20"] <= row["ratio"] <= row["ratio_p80"]
        assert all(math.isfinite(row[key]) and row[key] > 0 for key in ("a_ms", "b_ms", "ratio"))


def test_the_token_time_leaves_out_the_first_and_last_token() -> None:
    # A slow start, then steps that alternate between 1 and 3 s, then a slow end.
    gaps = [50, 50, 50, 50, 1, 3, 1, 3, 1, 3, 90]
    arrivals = [float(sum(gaps[:count])) for count in range(len(gaps) + 1)]
    assert served.token_time_ms(arrivals) == pytest.approx(2000.0)


def test_a_leg_repeats_its_own_prompts() -> None:
    first = served.draw_prompts(1, 2, vocab_size=100)
    assert first == served.draw_prompts(1, 2, vocab_size=100)
    assert first[0] != first[1]
    assert served.draw_prompts(2, 1, vocab_size=100)[0] not in first
    assert all(3 <= token < 100 for token in first[0])
