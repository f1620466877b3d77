"""The benchmark of fitting runs from start to end, and refuses curves that differ."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import fit_speed

ROOT = Path(__file__).parents[1]

ROW_KEYS = {
    "model",
    "loop",
    "rank",
    "epsilon",
    "steps",
    "batch_size",
    "max_length",
    "texts",
    "seconds",
    "steps_per_s",
    "memory_mib",
    "final_loss",
    "loss_difference",
    "speedup",
    "speedup_p20",
    "speedup_p80",
    "seconds_p20",
    "seconds_p80",
    "rounds",
}


@pytest.mark.matrix
def test_every_loop_is_measured_on_the_same_curve(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    options = ["--models", "tiny", "--rank", "8", "--rounds", "2", "--json", str(path)]
    line = [sys.executable, "-m", "benchmarks.fit_speed", *options]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(path.read_text())
    assert {"cpu", "cores", "load_average"} <= set(result["machine"])
    assert [(row["model"], row["loop"]) for row in result["rows"]] == [
        ("tiny", "head"),
        ("tiny", "plain"),
        ("tiny", "frozen"),
    ]
    for row in result["rows"]:
        assert set(row) == ROW_KEYS
        assert row["loss_difference"] <= 1e-3
        assert all(math.isfinite(row[key]) and row[key] > 0 for key in ("seconds", "memory_mib"))


def row(loop: str, losses: list[float], seconds: float, memory: float = 1.0) -> dict[str, Any]:
    figures = {"losses": losses, "seconds": seconds, "memory_mib": memory}
    return {"model": "m", "loop": loop, "steps": 2, **figures}


def test_the_speedup_is_over_the_head_of_the_same_round() -> None:
    head = [row("head", [2.0, 1.0], seconds) for seconds in (2.0, 4.0, 1.0)]
    plain = [row("plain", [2.0, 1.0005], s, m) for s, m in ((9.0, 5.0), (16.0, 7.0), (5.0, 6.0))]
    found = fit_speed.summed_up(plain, head)
    # 9 / 2, 16 / 4 and 5 / 1 in the order of size: 4, 4.5, 5.
    assert found["speedup"] == 4.5
    assert 4 < found["speedup_p20"] < 4.5 < found["speedup_p80"] < 5
    assert (found["seconds"], found["steps_per_s"]) == (9.0, 2 / 9)
    assert (found["memory_mib"], found["rounds"]) == (7.0, 3)
    assert found["loss_difference"] == pytest.approx(5e-4)


@pytest.mark.parametrize("loss", [1.002, math.nan])
def test_curves_that_differ_are_no_result(loss: float) -> None:
    with pytest.raises(SystemExit, match="m, plain: losses differ"):
        fit_speed.summed_up([row("plain", [2.0, loss], 9.0)], [row("head", [2.0, 1.0], 2.0)])
